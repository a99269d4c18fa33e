"""Conflicts settled at the features: what a fork claims, wherever it stands."""

import functools
import itertools
import re
from functools import partial

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam
from tests.conftest import skipped_under_strict_promotion
from tests.distributed.test_sharding import collectives
from tests.test_pairs import count

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4) ** 3
WEIGHTINGS = {
    "config": gdmam.config_weighting,
    "unit": gdmam.unit_weighting(preference=0.7),
    "upgrad": gdmam.upgrad_weighting,
    "norm": gdmam.norm_weighting,
}
GATES = {"open": gdmam.open_gate, "conflict": gdmam.conflict_gate, "cosine": gdmam.cosine_gate}


@partial(jax.jit, static_argnames=("dtype", "losses"))
def parameters(dtype=jnp.float32, losses=2):
    keys = jax.random.split(jax.random.key(0), 1 + losses)
    trunk, *heads = (jax.random.normal(key, (4, 4), dtype) for key in keys)
    return {"trunk": trunk, "heads": heads}


def trunk(params, x=X):
    return jnp.tanh(x @ params["trunk"])


def head_losses(heads, copies):
    targets = [jnp.cos(3 * k + jnp.arange(4.0)) for k in range(len(heads))]
    return [
        10.0**k * jnp.mean((copy @ head - target.astype(copy.dtype)) ** 2)
        for k, (head, copy, target) in enumerate(zip(heads, copies, targets, strict=True))
    ]


def loss(params, state=None, x=X, **choices):
    copies = gdmam.fork(trunk(params, x), len(params["heads"]), state=state, **choices)
    return sum(head_losses(params["heads"], copies))


def summed(params, x=X):
    return sum(head_losses(params["heads"], [trunk(params, x)] * len(params["heads"])))


def test_forward_the_identity():
    features = {"z": jnp.ones(3), "mask": jnp.array([True, False]), "key": jax.random.key(0)}
    copies = gdmam.fork(features, ("main", "aux"))
    assert list(copies) == ["main", "aux"]
    for copy in copies.values():
        chex.assert_trees_all_equal(copy["z"], features["z"])
        assert copy["mask"] is features["mask"]
        assert copy["key"] is features["key"]
    assert isinstance(gdmam.fork(jnp.ones(3), 4), tuple)


def central(function, point, step=1e-6):
    """The Jacobian by finite differences, rows the elements of the result."""
    columns, compiled = [], jax.jit(function)
    for index in np.ndindex(point.shape):
        moved = np.zeros(point.shape)
        moved[index] = step
        ends = [np.ravel(compiled(point + sign * moved)) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    return np.stack(columns, axis=1)


@functools.cache
def jacobians(losses):
    """Rows of the losses by the features, and of the features by the trunk."""
    params = jax.device_get(parameters(jnp.float64, losses))
    z = np.asarray(trunk(params))
    rows = central(lambda z: jnp.stack(head_losses(params["heads"], [z] * losses)), z)
    return rows, central(lambda w: trunk(params | {"trunk": w}), params["trunk"])


def settled(rows, weighting, gate):
    """The weighed and gated sum, as the formulas say, in NumPy."""
    gramian = rows @ rows.T
    lengths = np.sqrt(np.diagonal(gramian))
    weights = np.asarray(jax.jit(weighting)(gramian, lengths))
    cosines = gramian[0, 1:] / lengths[0] / lengths[1:]
    ratios = weights[1:] * lengths[1:] / (weights[0] * lengths[0])
    parallel, orthogonal = jax.device_get(jax.jit(gate)(cosines, ratios))
    total = weights[0] * rows[0]
    for k, row in enumerate(rows[1:]):
        along = (row @ rows[0]) / (rows[0] @ rows[0]) * rows[0]
        total = total + weights[1 + k] * (parallel[k] * along + orthogonal[k] * (row - along))
    return total


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("name", "losses"), [("config", 2), ("unit", 3), ("upgrad", 3)])
def test_against_finite_differences_of_what_it_claims(name, losses, gate, x64):
    choices = {"weighting": WEIGHTINGS[name], "gate": GATES[gate]}
    found = jax.jit(jax.grad(partial(loss, **choices)))(parameters(jnp.float64, losses))
    rows, through = jacobians(losses)
    expected = settled(rows, *choices.values()) @ through
    np.testing.assert_allclose(np.ravel(found["trunk"]), expected, rtol=1e-6, atol=1e-8)


def linear_losses(w, losses):
    """Of parameters that are features themselves."""
    points = np.random.default_rng(2).normal(size=(losses, *w.shape))
    return [10.0**k * jnp.sum((w - point) ** 2) for k, point in enumerate(points)]


@pytest.mark.parametrize(
    ("name", "gate", "losses"),
    [
        ("config", "open", 2),
        ("config", "open", 5),
        ("unit", "priority", 2),
        ("unit", "priority", 5),
        ("unit", "conflict", 3),
        ("upgrad", "open", 3),
        ("norm", "cosine", 2),
        ("norm", "cosine", 3),
    ],
)
def test_is_what_pairs_are_where_features_are_the_parameters(name, gate, losses, x64):
    """Step by step, with the same running means."""
    choices = {
        "weighting": WEIGHTINGS[name],
        "gate": (GATES | {"priority": gdmam.priority_gate})[gate],
        "statistics_decay": 0.8,
    }
    optimizer = gdmam.allocate(**choices, alignment_losses=losses - 1)

    def forked(w, state):
        copies = gdmam.fork(w, losses, state=state, **choices)
        return sum(linear_losses(copy, losses)[k] for k, copy in enumerate(copies))

    def paired(w):
        first, *others = linear_losses(w, losses)
        return first, tuple(others)

    @jax.jit
    def step(w, state, opt_state):
        gradient, state = jax.grad(forked, argnums=(0, 1))(w, state)
        _, pairs = gdmam.value_and_paired_grad(paired)(w)
        update, opt_state = optimizer.update(pairs, opt_state, w)
        return gradient, update, state, opt_state

    w = np.asarray(jax.random.normal(jax.random.key(1), (7,), jnp.float64))
    state, opt_state = gdmam.fork_state(losses, jnp.float64), optimizer.init(w)
    for _ in range(3):
        gradient, update, state, opt_state = step(w, state, opt_state)
        gradient, update = jax.device_get((gradient, update))
        scale = np.max(np.abs(update))
        np.testing.assert_allclose(gradient, update, rtol=1e-12, atol=1e-12 * scale)
        w = w - 0.01 * gradient / scale
    seen, expected = gdmam.diagnostics(state), gdmam.diagnostics(opt_state)
    chex.assert_trees_all_close(seen, {key: expected[key] for key in seen}, rtol=1e-9, atol=1e-12)


def test_what_follows_a_copy_gets_the_gradient_of_its_own_loss():
    params = parameters()
    chex.assert_trees_all_close(
        jax.jit(jax.grad(loss))(params)["heads"],
        jax.jit(jax.grad(summed))(params)["heads"],
        rtol=1e-6,
    )


def test_the_trunk_is_gone_through_once():
    """As many matrix products as the summed loss has."""
    params = parameters(losses=3)
    forked = partial(loss, weighting=gdmam.unit_weighting)
    programs = [jax.make_jaxpr(jax.grad(function))(params) for function in (forked, summed)]
    assert count(programs[0].jaxpr) == count(programs[1].jaxpr)


def test_the_state_is_its_own_gradient_and_compiles_once():
    optimizer = optax.adam(0.05)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    @chex.assert_max_traces(1)
    def step(params, state, opt_state):
        value, (gradient, state) = jax.value_and_grad(
            partial(loss, weighting=gdmam.unit_weighting), argnums=(0, 1)
        )(params, state)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, value

    params, state = parameters(), gdmam.fork_state(2)
    opt_state, norms, values = optimizer.init(params), [], []
    for _ in range(30):
        params, state, opt_state, value = step(params, state, opt_state)
        norms.append(gdmam.diagnostics(state)["alignment_norm"])
        values.append(value)
    assert values[-1] < values[0] / 2
    weights = 0.1 * 0.9 ** np.arange(30)[::-1]
    mean = np.sum(weights * np.array(norms)) / np.sum(weights)
    np.testing.assert_allclose(state.norms[1], mean, rtol=1e-5)


def test_the_state_goes_from_microbatch_to_microbatch():
    def accumulated(params, state):
        def one(state, x):
            gradient, state = jax.grad(partial(loss, x=x), argnums=(0, 1))(params, state)
            return state, gradient

        state, gradients = jax.lax.scan(one, state, X.reshape(4, 4, 4))
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), gradients), state

    params = parameters()
    gradient, state = jax.jit(accumulated)(params, gdmam.fork_state(2))
    one = jax.jit(jax.grad(lambda params, x: loss(params, x=x)))
    each = [one(params, x) for x in X.reshape(4, 4, 4)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *each)
    chex.assert_trees_all_close(gradient, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.remainder, 0.9**4, rtol=1e-6)


def layers(weights, states, preference, x=X):
    """A fork after each layer: one copy goes on, the other has a loss there."""

    def layer(x, given):
        weight, state = given
        onward, aside = gdmam.fork(
            jnp.tanh(x @ weight),
            2,
            state=state,
            weighting=gdmam.unit_weighting(preference=preference),
        )
        return onward, jnp.mean((aside - 1) ** 2)

    if preference is None:
        preference = 1.0
    return layer, (x, (weights, states))


@pytest.mark.parametrize("wrap", [lambda layer: layer, jax.checkpoint], ids=["plain", "remat"])
def test_a_fork_in_every_layer_of_a_scan_with_a_scheduled_preference(wrap, x64):
    weights = jax.random.normal(jax.random.key(4), (3, 4, 4), jnp.float64)
    states = jax.tree.map(lambda leaf: np.stack([leaf] * 3), gdmam.fork_state(2, jnp.float64))

    def scanned(weights, states, preference):
        layer, (x, given) = layers(weights, states, preference)
        x, losses = jax.lax.scan(wrap(layer), jnp.asarray(x, jnp.float64), given)
        return jnp.mean(x**2) + jnp.sum(losses)

    def unrolled(weights, states, preference):
        layer, (x, given) = layers(weights, states, preference)
        x, losses = jnp.asarray(x, jnp.float64), 0.0
        for k in range(3):
            x, more = layer(x, jax.tree.map(lambda leaf, k=k: leaf[k], given))
            losses = losses + more
        return jnp.mean(x**2) + losses

    compiled = jax.jit(jax.grad(scanned, argnums=(0, 1)))
    found = compiled(weights, states, 0.3)
    expected = jax.jit(jax.grad(unrolled, argnums=(0, 1)))(weights, states, 0.3)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-12)
    assert gdmam.diagnostics(found[1])["cosine"].shape == (3,)
    chex.assert_trees_all_close(
        *(compiled(weights, states, preference) for preference in (0.0, jnp.zeros(())))
    )


@skipped_under_strict_promotion("the loss")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_half_precision_are_taken_in_float32(dtype):
    """A sum of 4,096 ones stops at 256 in bfloat16, at 2,048 in float16."""

    def loss(z, state):
        first, second = gdmam.fork(z, 2, state=state)
        return jnp.sum(first.astype(jnp.float32)) - jnp.sum(second.astype(jnp.float32))

    z = jnp.ones(4096, dtype)
    gradient, state = jax.grad(loss, argnums=(0, 1))(z, gdmam.fork_state(2))
    assert gradient.dtype == dtype
    assert not gradient.any()
    assert gdmam.diagnostics(state)["prediction_norm"] == 64
    assert gdmam.diagnostics(state)["cosine"] == -1


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("gate", [*GATES, "priority"])
def test_heads_without_a_gradient(name, gate):
    gate = (GATES | {"priority": gdmam.priority_gate})[gate]
    choices = {"weighting": WEIGHTINGS[name], "gate": gate}

    def stopped(z, silent):
        copies = gdmam.fork(z, 2, **choices)
        parts = [jnp.sum(jnp.sin(copy)) for copy in copies]
        return sum(jax.lax.stop_gradient(p) if k in silent else p for k, p in enumerate(parts))

    @jax.jit
    def gradients(z):
        return [jax.grad(stopped)(z, silent) for silent in ({1}, {0}, {0, 1})]

    z = np.arange(3, dtype=np.float32)
    only = np.asarray(gradients(z))
    for gradient in only:
        assert np.isfinite(gradient).all()
    # What is left points along the one gradient there is.
    for gradient in only[:2]:
        cosine = gradient @ np.cos(z) / np.linalg.norm(gradient) / np.linalg.norm(np.cos(z))
        if name != "norm" or gate is not gdmam.cosine_gate:
            np.testing.assert_allclose(cosine, 1, rtol=1e-6)
    assert not only[2].any()


def test_weightings_with_a_memory():
    """Step by step as in an optimizer, counters and flags too."""
    weighting = gdmam.gradvac_weighting(decay=0.5)
    link = gdmam.allocate(weighting, gdmam.open_gate, alignment_losses=2)

    def losses(w):
        return jnp.sum((w - 1) ** 2), (jnp.sum((w + 1) ** 2), 3 * jnp.sum(w**4))

    def forked(w, state):
        copies = gdmam.fork(w, 3, weighting=weighting, state=state)
        parts = [jax.tree.leaves(losses(copy))[k] for k, copy in enumerate(copies)]
        return sum(parts)

    @jax.jit
    def both(w, state, opt_state):
        _, pairs = gdmam.value_and_paired_grad(losses)(w)
        return jax.grad(forked, argnums=(0, 1))(w, state), link.update(pairs, opt_state, w)

    w = jnp.array([0.5, -0.3, 0.2])
    state, opt_state = gdmam.fork_state(3, weighting=weighting), link.init(w)
    for _ in range(3):
        (gradient, state), (update, opt_state) = both(w, state, opt_state)
        np.testing.assert_allclose(gradient, update, rtol=1e-5)
        w = w - 0.05 * gradient
    memories = zip(*map(jax.tree.leaves, (state.memory, opt_state.memory)), strict=True)
    for found, expected in memories:
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_several_forks_settle_apart():
    def loss(params, states):
        first, second = gdmam.fork(params["a"], 2, state=states["a"])
        third, fourth = gdmam.fork(params["b"], 2, state=states["b"])
        return first[0] + 3 * second[1] + third[0] - 5 * fourth[0]

    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    states = {name: gdmam.fork_state(2) for name in params}
    gradient, states = jax.grad(loss, argnums=(0, 1))(params, states)
    seen = gdmam.diagnostics(states)
    assert (seen["a/cosine"], seen["b/cosine"]) == (0, -1)
    np.testing.assert_allclose(gradient["a"], [2, 2], rtol=1e-6)
    np.testing.assert_allclose(gradient["b"], [0, 0], atol=1e-6)


@pytest.mark.parametrize("losses", [2, 5])
def test_data_parallelism_costs_one_message_of_the_products(losses, x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = parameters(jnp.float64, losses)
    x = jax.device_put(X.astype(np.float64), NamedSharding(mesh, P("data")))
    forked, plain = (
        jax.jit(jax.grad(partial(function, **given))).lower(params, x=x).compile()
        for function, given in ((loss, {"weighting": gdmam.upgrad_weighting}), (summed, {}))
    )
    alone = jax.jit(jax.grad(partial(loss, weighting=gdmam.upgrad_weighting)))(params)
    chex.assert_trees_all_close(forked(params, x=x), alone, rtol=1e-12, atol=1e-12)
    messages = [
        [shapes for computation, kind, shapes in collectives(program.as_text()) if computation]
        for program in (forked, plain)
    ]
    sizes = [sum(map(size_of, itertools.chain(*found))) for found in messages]
    assert sizes[0] - sizes[1] == losses * (losses + 1) // 2
    assert len(messages[0]) - len(messages[1]) == 1


def size_of(shape):
    return int(np.prod([int(n) for n in re.search(r"\[(.*)\]", shape)[1].split(",") if n]))


@pytest.mark.parametrize("gradient_outside", [False, True])
def test_inside_shard_map_the_axis_is_named(gradient_outside, x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params, state = parameters(jnp.float64), gdmam.fork_state(2, jnp.float64)
    choices = {"weighting": gdmam.unit_weighting, "gate": gdmam.conflict_gate}

    def value(params, state, x, **given):
        return jax.lax.pmean(loss(params, state, x, **choices, **given), "data")

    def differentiated(function):
        return lambda *args: jax.grad(function, argnums=(0, 1))(*args)

    def mapped(function):
        return jax.shard_map(function, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())

    named = partial(value, axis_name="data")
    wrapped = differentiated(mapped(named)) if gradient_outside else mapped(differentiated(named))
    x = np.float64(X)
    expected = jax.jit(jax.grad(partial(loss, **choices), argnums=(0, 1)))(params, state, x)
    found = jax.jit(wrapped)(params, state, x)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="manual axis types do not match"):
        jax.eval_shape(mapped(differentiated(value)), params, state, x)


def test_inside_pmap_the_axis_is_named(x64):
    params = parameters(jnp.float64)

    def gradient(params, x):
        # Each device's share of the whole batch's loss; pmap knows of no other convention.
        one = jax.grad(lambda p: loss(p, x=x, weighting=gdmam.unit_weighting, axis_name="i") / 8)
        return jax.lax.psum(one(params), "i")

    x = np.float64(X)
    found = jax.pmap(gradient, axis_name="i", in_axes=(None, 0))(params, x.reshape(8, 2, 4))
    expected = jax.jit(jax.grad(partial(loss, weighting=gdmam.unit_weighting)))(params, x=x)
    chex.assert_trees_all_close(
        jax.tree.map(lambda leaf: leaf[0], found), expected, rtol=1e-12, atol=1e-12
    )


def test_inside_a_vmap_over_examples_the_axis_is_named(x64):
    """Without a name each example settles its conflict alone."""
    params, state = parameters(jnp.float64), gdmam.fork_state(2, jnp.float64)
    x = np.float64(X)
    choices = {"weighting": gdmam.unit_weighting}

    def batched(params, state, axis_name=None):
        def one(row):
            return loss(params, state, row[None], axis_name=axis_name, **choices)

        return jnp.mean(jax.vmap(one, axis_name="batch")(x))

    expected = jax.jit(jax.grad(partial(loss, **choices), argnums=(0, 1)))(params, state, x)
    found = jax.jit(jax.grad(partial(batched, axis_name="batch"), argnums=(0, 1)))(params, state)
    chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)

    alone = jax.jit(jax.grad(batched))(params, None)["trunk"]
    one = jax.jit(jax.grad(lambda p, row: loss(p, None, row[None], **choices) / len(x)))
    each = [one(params, row)["trunk"] for row in x]
    np.testing.assert_allclose(alone, sum(each), rtol=1e-9)
    assert not np.allclose(alone, expected[0]["trunk"], rtol=0.1)


class Shared(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(4, 4, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(4, 1, rngs=rngs) for _ in range(2)])

    def __call__(self, x, state):
        copies = gdmam.fork(jnp.tanh(self.trunk(x)), 2, state=state)
        return [head(copy) for head, copy in zip(self.heads, copies, strict=True)]


def test_in_a_module_of_flax_nnx():
    model, state = Shared(nnx.Rngs(0)), gdmam.fork_state(2)
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, state):
        def loss(model, state):
            first, second = model(X, state)
            return jnp.mean((first - 1) ** 2) + 100 * jnp.mean((second + 1) ** 2)

        value, (gradient, state) = nnx.value_and_grad(loss, argnums=(0, 1))(model, state)
        optimizer.update(model, gradient)
        return value, state

    values = []
    for _ in range(30):
        value, state = step(model, optimizer, state)
        values.append(value)
    assert values[-1] < values[0] / 2
    assert gdmam.diagnostics(state)["alignment_norm"] > 0


def test_in_a_module_of_flax_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, state):
            copies = gdmam.fork(jnp.tanh(nn.Dense(4)(x)), ("main", "aux"), state=state)
            return {name: nn.Dense(1, name=name)(copy) for name, copy in copies.items()}

    model, state = Model(), gdmam.fork_state(("main", "aux"))
    params = model.init(jax.random.key(0), X, state)

    def loss(params, state):
        out = model.apply(params, X, state)
        return jnp.mean((out["main"] - 1) ** 2) + jnp.mean((out["aux"] + 1) ** 2)

    gradient, state = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, state)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert set(gdmam.diagnostics(state)) >= {"prediction_norm", "cosine/aux"}


def test_in_a_module_of_equinox():
    class Model(eqx.Module):
        trunk: eqx.nn.Linear
        heads: list

        def __call__(self, x):
            copies = gdmam.fork(jnp.tanh(self.trunk(x)), 2, axis_name="batch")
            return [head(copy) for head, copy in zip(self.heads, copies, strict=True)]

    def loss(outputs):
        first, second = outputs
        return jnp.mean((first - 1) ** 2) + jnp.mean((second + 1) ** 2)

    def in_the_module(model):
        return loss(jax.vmap(model, axis_name="batch")(X))

    def outside(model, split):
        copies = split(jnp.tanh(jax.vmap(model.trunk)(X)), 2)
        return loss([jax.vmap(head)(copy) for head, copy in zip(model.heads, copies, strict=True)])

    @jax.jit
    def gradients():
        keys = jax.random.split(jax.random.key(0), 3)
        heads = [eqx.nn.Linear(4, 1, key=key) for key in keys[1:]]
        model = Model(eqx.nn.Linear(4, 4, key=keys[0]), heads)
        results = (
            eqx.filter_grad(in_the_module)(model),
            eqx.filter_grad(outside)(model, gdmam.fork),
            eqx.filter_grad(outside)(model, lambda z, losses: (z,) * losses),
        )
        return [result.trunk.weight for result in results]

    found, expected, summed = jax.device_get(gradients())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found, summed, rtol=0.1)


@pytest.mark.parametrize("inside_scan", [False, True])
def test_forward_mode_is_refused(inside_scan):
    def forked(z):
        return sum(gdmam.fork(z, 2))

    def scanned(z):
        return jax.lax.scan(lambda carry, _: (forked(carry), None), z, length=2)[0]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(scanned if inside_scan else forked, (jnp.ones(2),), (jnp.ones(2),))


def test_the_settled_gradient_has_a_derivative(x64):
    def value(z):
        first, second = gdmam.fork(z, 2)
        return jnp.sum(first**3) + jnp.prod(second - 2)

    z = jnp.array([0.3, -0.5, 0.8])
    expected = central(jax.jit(jax.grad(value)), np.asarray(z))
    for derivative in (jax.hessian, lambda f: jax.jacrev(jax.grad(f))):
        np.testing.assert_allclose(jax.jit(derivative(value))(z), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("made_for", [2, ("main", "aux")])
def test_a_state_made_with_a_number_knows_the_names_of_the_fork(made_for):
    weighting = gdmam.unit_weighting(preference={"aux": 2.0})

    def loss(w, state):
        copies = gdmam.fork(w, ("main", "aux"), weighting=weighting, state=state)
        return copies["main"][0] + 99 * copies["aux"][1]

    @jax.jit
    def gradients(w, state):
        first, state = jax.grad(loss, argnums=(0, 1))(w, state)
        return first, *jax.grad(loss, argnums=(0, 1))(w, state)

    first, second, _ = gradients(np.zeros(2), gdmam.fork_state(made_for))
    np.testing.assert_allclose(first, second, rtol=1e-5)
    assert first[1] == pytest.approx(2 * first[0])


def test_names_are_in_the_order_as_written():
    names = ("z_main", "b", "a")

    def loss(z, state):
        copies = gdmam.fork(
            z, names, state=state, weighting=gdmam.unit_weighting(preference=(0.5, 0.25))
        )
        return copies["z_main"][0] + copies["b"][1] + copies["a"][2]

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    gradient, state = gradients(jnp.zeros(3), gdmam.fork_state(names))
    assert gradient.tolist() == [1, 0.5, 0.25]
    assert gdmam.diagnostics(state)["alignment_weight/a"] == 0.25


def remembering(weighting):
    """Steps of losses with a fork that remembers: one that reaches the copies, and one not."""
    x = np.linspace(-1, 1, 6).reshape(2, 3)

    @jax.jit
    def step(w, state, factor):
        def loss(w, state):
            first, second = gdmam.fork(x * w, 2, state=state, weighting=weighting)
            return factor * jnp.mean(first**2) + 10 * jnp.mean(jnp.abs(second))

        return jax.grad(loss, argnums=(0, 1))(w, state)

    @jax.jit
    def unreached(w, state):
        def loss(w, state):
            gdmam.fork(x * w, 2, state=state, weighting=weighting)
            return jnp.mean(w)

        return jax.grad(loss, argnums=(0, 1))(w, state)[1]

    return step, unreached, gdmam.fork_state(2, weighting=weighting)


@pytest.mark.parametrize(
    "weighting", [gdmam.unit_weighting, gdmam.gradient_norm_weighting(), gdmam.gradvac_weighting()]
)
def test_a_step_that_is_not_finite_changes_nothing_in_a_state(weighting):
    """The gradient itself is not finite, and the optimizer's to deal with."""
    step, _, state = remembering(weighting)
    w = jnp.arange(1.0, 4.0)
    _, before = step(w, state, 1.0)
    gradient, after = step(w, before, jnp.nan)
    assert not np.isfinite(gradient).any()
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("weighting", [gdmam.unit_weighting, gdmam.gradient_norm_weighting()])
def test_after_a_step_that_reaches_no_copy_a_state_starts_afresh(weighting):
    step, unreached, state = remembering(weighting)
    w = jnp.arange(1.0, 4.0)
    expected, fresh = step(w, state, 1.0)
    lost = unreached(w, fresh)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(lost))
    gradient, after = step(w, lost, 1.0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, fresh)


def test_an_inner_derivative_is_weighed_too():
    """A known limit: a loss that contains a derivative through a fork has another value."""

    def loss(w, fork):
        def twice(x):
            first, second = fork(jnp.tanh(x * w))
            return jnp.sum(first) + 0 * jnp.sum(second)

        return jax.grad(twice)(0.5)

    w = jnp.array([1.0, 2.0])
    expected = loss(w, lambda features: (features, features))
    found = loss(w, lambda features: gdmam.fork(features, 2, weighting=gdmam.unit_weighting))
    assert abs(found - expected) > 0.1
    np.testing.assert_allclose(loss(w, lambda features: gdmam.fork(features, 2)), expected, 1e-6)


def test_dynamic_scale_divides_the_state_too():
    """A known limit; without a state the gradient is right."""
    x, w = np.linspace(-1, 1, 6).reshape(2, 3), np.arange(1.0, 4.0)

    def loss(w, state):
        first, second = gdmam.fork(x * w, 2, state=state)
        return jnp.mean(first**2) + 10 * jnp.mean(jnp.abs(second))

    scale = DynamicScale(scale=1024.0)
    found = jax.jit(scale.value_and_grad(loss))(w, None)[3]
    np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(w, None), rtol=1e-5)
    state = gdmam.fork_state(2)
    new = jax.jit(jax.grad(loss, argnums=1))(w, state)
    divided = jax.jit(scale.value_and_grad(loss, argnums=1))(w, state)[3]
    np.testing.assert_allclose(divided.weights, np.asarray(new.weights) / 1024, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gdmam.fork(jnp.ones(2), 1), ValueError, "losses must be a number.*got 1"),
        (lambda: gdmam.fork(jnp.ones(2), ("a", "a")), ValueError, "losses must.*each once"),
        (lambda: gdmam.fork_state("ab"), ValueError, "losses must be a number"),
        (lambda: gdmam.fork(jnp.arange(2), 2), TypeError, "needs a floating-point array"),
        (lambda: gdmam.fork({"a": 1j * jnp.ones(2)}, 2), TypeError, "features at a have.*complex"),
        (lambda: gdmam.fork(jnp.ones(2), 2, gate=3), TypeError, "gate must be a function"),
        (lambda: gdmam.fork(jnp.ones(2), 2, state=3), TypeError, "a Allocation, got int"),
        (
            lambda: gdmam.fork(jnp.ones(2), 2, state=gdmam.fork_state(3)),
            ValueError,
            "state was made",
        ),
        (
            lambda: gdmam.fork(jnp.ones(2), ("a", "b"), state=gdmam.fork_state(("a", "c"))),
            ValueError,
            "state was made for 2 losses named",
        ),
        (
            lambda: gdmam.fork(
                jnp.ones(2), 2, weighting=gdmam.gradvac_weighting(), state=gdmam.fork_state(2)
            ),
            ValueError,
            "for another weighting; make one with fork_state",
        ),
        (
            lambda: gdmam.fork(jnp.ones(2), 2, weighting=gdmam.gradvac_weighting),
            ValueError,
            r"remembers: give fork state=fork_state\(2, weighting=...\)",
        ),
        (
            lambda: gdmam.fork(jnp.ones(2), 2, weighting=lambda gramian, norms: jnp.ones(3)),
            ValueError,
            "weighting must return 2 weights",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
