"""Several alignment losses: in a tuple, or in a dictionary by name."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam
import gdmam_jax.nnx
from gdmam_jax._geometry import gramian
from gdmam_jax._scopes import Scopes
from tests.compatibility.harness import example_params, train
from tests.conftest import skipped_under, skipped_under_strict_promotion
from tests.test_pairs import count

NAMES = ("first", "second")
PARAMS = {"w": np.float32([[1.0, -2.0], [0.5, 3.0]]), "b": np.float32([0.3, -0.7])}


def losses(params, container=dict):
    hidden = jnp.tanh(params["w"] @ jnp.array([1.0, 2.0]) + params["b"])
    first, second = jnp.sum(jnp.cos(hidden)), jnp.sum(params["b"] ** 2)
    alignment = {"first": first, "second": second} if container is dict else (first, second)
    return jnp.sum(hidden**2), alignment


@pytest.mark.parametrize("container", [dict, tuple])
def test_gradients_are_those_of_each_loss(container, x64):
    params = jax.tree.map(np.float64, PARAMS)
    values, pairs = jax.jit(
        gdmam.value_and_paired_grad(functools.partial(losses, container=container))
    )(params)
    prediction, alignment = gdmam.unpair_gradients(pairs)
    assert type(values[1]) is type(alignment) is container
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14)
    expected = jax.jit(jax.grad(lambda p: losses(p)[0]))(params)
    jax.tree.map(close, prediction, expected)
    for key, name in zip(NAMES if container is dict else (0, 1), NAMES, strict=True):
        expected = jax.jit(jax.grad(lambda p, name=name: losses(p)[1][name]))(params)
        jax.tree.map(close, alignment[key], expected)
    again = gdmam.pair_gradients(prediction, alignment)
    assert jax.tree.structure(again) == jax.tree.structure(pairs)


def test_work_of_one_loss_is_not_done_for_the_others():
    """Three towers on one encoder: forward 4 products, backward 3 for each loss."""

    def towers(params, x):
        hidden = x @ params["shared"]
        ends = [jnp.sum(jnp.sin(hidden @ params[name])) for name in "abc"]
        return ends[0], tuple(ends[1:])

    params = {name: jnp.ones((4, 4)) for name in ("shared", *"abc")}
    program = jax.make_jaxpr(gdmam.value_and_paired_grad(towers))(params, jnp.ones((2, 4)))
    assert count(program.jaxpr) == 4 + 3 * 3


def test_modules_of_flax_nnx():
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gdmam.gdmam(0.1, alignment_losses=NAMES), wrt=nnx.Param)

    def losses(model, x):
        y = model(x)
        return jnp.mean((y - 1) ** 2), {"first": jnp.mean(y), "second": jnp.sum(model.bias[...])}

    @nnx.jit
    def step(model, optimizer, x):
        (_, alignment), pairs = gdmam.nnx.value_and_paired_grad(losses)(model, x)
        optimizer.update(model, pairs)
        return alignment, pairs

    alignment, pairs = step(model, optimizer, np.ones((3, 2)))
    assert set(alignment) == set(NAMES)
    np.testing.assert_allclose(pairs["bias"].alignment["second"], [1])
    assert -1 <= gdmam.diagnostics(optimizer.opt_state)["cosine/first"] <= 1


OPTIMIZERS = {
    "default": lambda **given: gdmam.gdmam(0.05, **given),
    "separate": lambda **given: gdmam.gdmam(
        0.05, momentum=gdmam.relative_momentum, momenta="separate", **given
    ),
    "momentum": lambda **given: gdmam.scale_by_gdmam(**given),
    "scoped": lambda **given: gdmam.scale_by_gdmam(scope=gdmam.leaf_scope, **given),
    "weighed": lambda **given: gdmam.weighed(optax.sgd(0.1, 0.9), gdmam.unit_weighting, **given),
}


def four_steps(optimizer, wrap):
    """Updates and last state, of random gradients."""
    state, update_once, updates = optimizer.init(PARAMS), jax.jit(optimizer.update), []
    random = np.random.default_rng(0)
    for _ in range(4):
        prediction, alignment = (
            jax.tree.map(lambda leaf: np.float32(random.normal(size=leaf.shape)), PARAMS)
            for _ in range(2)
        )
        pairs = gdmam.pair_gradients(prediction, wrap(alignment))
        update, state = update_once(pairs, state, PARAMS)
        updates.append(update)
    return jax.device_get((updates, state))


@functools.cache
def plain_steps(name):
    return four_steps(OPTIMIZERS[name](), lambda alignment: alignment)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("given", [{}, {"alignment_losses": ("only",)}], ids=["number", "name"])
def test_one_loss_in_a_dictionary_is_the_plain_form_bit_for_bit(name, given):
    found = four_steps(OPTIMIZERS[name](**given), lambda alignment: {"only": alignment})
    updates, state = plain_steps(name)
    jax.tree.map(np.testing.assert_array_equal, found[0], updates)
    for one, other in zip(*map(jax.tree.leaves, (found[1], state)), strict=True):
        np.testing.assert_array_equal(one, other)


def reference_step(gradients, norms, m, steered):
    """One step of the allocated form in NumPy: unit weights, priority gate, decay 0.9."""
    g_p, *others = gradients
    n = [np.linalg.norm(g) for g in gradients]
    w = [1 / max(norm, mean) for norm, mean in zip(n, norms, strict=True)]
    parts = [w[0] * g_p]
    for k, g in enumerate(others, start=1):
        parallel = (g @ g_p) / (g_p @ g_p) * g_p
        conflict = -(g @ g_p) / (n[0] * n[k])
        ratio = (w[k] * n[k]) / (w[0] * n[0])
        kept = 1.0
        if conflict > 0:
            kept = np.clip((conflict / ratio + conflict**2 - 1) / conflict**2, 0, 1)
        parts += [w[k] * kept * parallel, w[k] * (g - parallel)]
    return 0.9 * m + 0.1 * sum(parts)


@pytest.mark.parametrize("momenta", ["steered", "separate"])
def test_each_alignment_gradient_is_gated_by_itself(momenta, x64):
    random = np.random.default_rng(1)
    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.unit_weighting,
        momentum=gdmam.constant_momentum(initial=0.9),
        momenta=momenta,
        alignment_losses=3,
        statistics_decay=0.8,
    )
    state, m = optimizer.init(jnp.zeros(6)), np.zeros(6)
    update_once = jax.jit(optimizer.update)
    assert len(state.momenta) == (1 if momenta == "steered" else 7)
    sums, weight = np.zeros(4), 0.0
    for step in range(5):
        gradients = random.normal(size=(4, 6))
        gradients[1] -= gradients[0]
        sums = 0.8 * sums + np.linalg.norm(gradients, axis=1)
        weight = 0.8 * weight + 1
        m = reference_step(gradients, sums / weight, m, momenta == "steered")
        g_p, *others = gradients
        update, state = update_once(gdmam.GradientPair(g_p, tuple(others)), state)
        np.testing.assert_allclose(update, m / (1 - 0.9 ** (step + 1)), rtol=1e-9)


def example(steps=6):
    params = example_params()
    keys = jax.random.split(jax.random.key(0), 3)

    def draw(key):
        return jax.tree.map(
            lambda leaf: 0.5 * jax.random.normal(key, (steps, *leaf.shape), leaf.dtype), params
        )

    return params, gdmam.pair_gradients(
        draw(keys[0]), {"first": draw(keys[1]), "second": draw(keys[2])}
    )


@skipped_under("jax_disable_jit", "compiles nothing")
@skipped_under_strict_promotion("optax.MultiSteps")
def test_wrappers_masks_and_partitions():
    """One compilation, states of constant types (see `train`), and what each computes."""
    params, pairs = example()
    ours = functools.partial(gdmam.gdmam, 0.05, alignment_losses=NAMES)
    labels = {"trunk": {"kernel": "ours"}, "head": {"kernel": "sum", "bias": "sum"}}
    trunk = jax.tree.map(lambda label: label == "ours", labels)
    optimizers = {
        "plain": ours(),
        "lifted": gdmam.over_pairs(lambda tx: tx, ours(), alignment_losses=NAMES),
        "steps": gdmam.over_pairs(
            lambda tx: optax.MultiSteps(tx, 2), ours(), alignment_losses=NAMES
        ),
        "partition": optax.partition({"ours": ours(), "sum": gdmam.summed(optax.sgd(0.1))}, labels),
        "masked": optax.chain(
            optax.masked(ours(), trunk),
            optax.masked(gdmam.summed(optax.sgd(0.1)), jax.tree.map(lambda m: not m, trunk)),
        ),
    }
    runs = train(optimizers, params, pairs)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        runs["lifted"].params,
        runs["plain"].params,
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7),
        runs["partition"].params,
        runs["masked"].params,
    )
    summed = 0.1 * sum(jax.tree.leaves(pairs["head"]["bias"]))
    np.testing.assert_allclose(
        runs["partition"].updates["head"]["bias"], -summed, rtol=1e-5, atol=1e-7
    )
    averaged = jax.tree.map(lambda x: jnp.mean(x.reshape(3, 2, *x.shape[1:]), axis=1), pairs)
    # Two halves of steps are run: three averaged ones are not even.
    even = jax.tree.map(lambda x: x[:2], averaged)
    alone = train({"it": ours()}, params, even)["it"]
    jax.tree.map(
        lambda found, expected: np.testing.assert_allclose(
            found[1:4:2], expected, rtol=1e-5, atol=1e-6
        ),
        runs["steps"].params,
        alone.params,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)
    optimizer = gdmam.gdmam(0.1, alignment_losses=2)
    pairs = gdmam.pair_gradients(params, (params, jax.tree.map(jnp.negative, params)))
    updates, state = jax.jit(optimizer.update)(pairs, optimizer.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(gdmam.diagnostics(state)["cosine/1"], -1, rtol=1e-5)


def test_vmap_over_models():
    models = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf + 0.3]), PARAMS)
    optimizer = gdmam.gdmam(0.1, alignment_losses=NAMES)

    def step(params):
        _, pairs = gdmam.value_and_paired_grad(losses)(params)
        return optimizer.update(pairs, optimizer.init(params), params)[0]

    together, single = jax.jit(jax.vmap(step))(models), jax.jit(step)
    for row in range(2):
        alone = single(jax.tree.map(lambda leaf, row=row: leaf[row], models))
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-4, atol=1e-6),
            together,
            alone,
        )


@skipped_under("jax_disable_jit", "compiles nothing")
def test_shards_send_one_message_of_all_inner_products(x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    params = {"w": np.arange(16.0).reshape(8, 2), "b": np.ones(8)}
    optimizer = gdmam.gdmam(0.1, alignment_losses=2)
    others = (jax.tree.map(np.sin, params), jax.tree.map(lambda x: -x + np.cos(x), params))
    expected, _ = jax.jit(optimizer.update)(
        gdmam.pair_gradients(params, others), optimizer.init(params), params
    )
    with jax.set_mesh(mesh):
        params, others = jax.device_put((params, others), NamedSharding(mesh, P("data")))
        pairs = gdmam.pair_gradients(params, others)
        given = pairs, optimizer.init(params), params
        program = jax.jit(optimizer.update).lower(*given).compile()
        found, _ = program(*given)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), found, expected)
    messages = [line for line in program.as_text().splitlines() if " all-reduce(" in line]
    assert len(messages) == 1
    assert "f64[6]" in messages[0]


def test_a_gradient_that_is_whole_where_others_are_sharded_counts_once(x64):
    """Of many gradients, too, whose inner products are one matrix product."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    random = np.random.default_rng(0)
    sharded, whole = random.normal(size=(6, 8, 3)), random.normal(size=(6, 2, 3))
    specs = [P("data")] * 6 + [P()] * 5 + [P("data", None)]

    def gradients(sharded, whole):
        # What is whole on an axis is held against the shard that each device has.
        rows = sharded.shape[1]
        return [*sharded, *(jnp.tile(each, (rows // 2, 1)) for each in whole)]

    def products(*leaves):
        pair = gdmam.GradientPair(leaves[0], tuple(leaves[1:]))
        return gramian([pair], Scopes(), ("data", "model"))

    leaves = gradients(sharded, whole)
    local = [leaf if spec != P() else leaf[:2] for leaf, spec in zip(leaves, specs, strict=True)]
    found = jax.jit(jax.shard_map(products, mesh=mesh, in_specs=tuple(specs), out_specs=P()))(
        *local
    )
    rows = np.stack([np.ravel(leaf) for leaf in leaves])
    expected = rows @ rows.T
    # Two that are whole meet once, and not on every device.
    both = np.array([spec == P() for spec in specs])
    expected = np.where(np.outer(both, both), expected / 4, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def many_pairs(count, seed=0):
    random = np.random.default_rng(seed)
    first, *others = (
        jax.tree.map(lambda leaf: random.normal(size=leaf.shape), PARAMS) for _ in range(count)
    )
    return gdmam.pair_gradients(first, tuple(others))


@pytest.mark.parametrize("scope", [None, gdmam.leaf_scope])
@pytest.mark.parametrize("count", [7, 8, 30])
def test_inner_products_of_few_and_of_many(count, scope, x64):
    pairs = many_pairs(count)
    leaves = jax.tree.leaves(pairs, is_leaf=lambda node: isinstance(node, gdmam.GradientPair))
    scopes = Scopes.of(PARAMS, scope)
    found = jax.jit(lambda leaves: gramian(leaves, scopes))(leaves)
    rows = [
        np.stack([np.ravel(half) for half in (pair.prediction, *pair.alignment)]) for pair in leaves
    ]
    each = np.stack([row @ row.T for row in rows])
    expected = each.sum(axis=0) if scope is None else each
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["upgrad", "mgda", "pcgrad", "dual_proj", "cagrad", "nash_mtl", "config", "unit"]
)
def test_the_program_grows_no_faster_than_the_number_of_losses(name):
    def size(count):
        weighting = getattr(gdmam, f"{name}_weighting")
        optimizer = gdmam.weighed(optax.identity(), weighting, alignment_losses=count - 1)
        state = jax.eval_shape(optimizer.init, PARAMS)
        program = jax.jit(optimizer.update).lower(many_pairs(count), state)
        return len(program.as_text().splitlines())

    ten, twenty, forty = map(size, (10, 20, 40))
    assert forty - twenty <= 1.1 * 2 * (twenty - ten)


MISTAKES = {
    "more than said": ({}, (PARAMS, PARAMS), r"alignment_losses=1.*hold 2"),
    "fewer than said": ({"alignment_losses": 2}, PARAMS, r"alignment_losses=2.*hold 1"),
    "other names": (
        {"alignment_losses": ("a", "b")},
        {"a": PARAMS, "c": PARAMS},
        r"\('a', 'b'\).*hold 2: a, c",
    ),
    "no names": (
        {"alignment_losses": ("a", "b")},
        (PARAMS, PARAMS),
        r"\('a', 'b'\).*hold 2: 0, 1",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("form", ["gdmam", "weighed"])
def test_another_number_of_losses_is_refused(case, form):
    given, alignment, message = MISTAKES[case]
    make = OPTIMIZERS["default" if form == "gdmam" else form]
    optimizer = make(**given)
    with pytest.raises(ValueError, match=message):
        optimizer.update(gdmam.pair_gradients(PARAMS, alignment), optimizer.init(PARAMS), PARAMS)


def test_the_released_form_takes_one_alignment_loss():
    optimizer = gdmam.gdmam_released()
    with pytest.raises(ValueError, match=r"alignment_losses=1.*hold 2"):
        optimizer.update(
            gdmam.pair_gradients(PARAMS, (PARAMS, PARAMS)), optimizer.init(PARAMS), PARAMS
        )
    state = optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    plain, _ = update(gdmam.pair_gradients(PARAMS, PARAMS), state, PARAMS)
    named, _ = update(gdmam.pair_gradients(PARAMS, {"only": PARAMS}), state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, plain, named)


def test_leaves_with_other_losses_are_refused():
    pairs = {
        "w": gdmam.GradientPair(jnp.ones(2), {"a": jnp.ones(2)}),
        "b": gdmam.GradientPair(jnp.ones(2), {"c": jnp.ones(2)}),
    }
    with pytest.raises(ValueError, match="same alignment losses as every other pair"):
        gdmam.decompose(pairs)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda w: (jnp.sum(w), {"a": w}), r"alignment loss a must be .* float(32|64)\[3\]"),
        (lambda w: (jnp.sum(w), (jnp.sum(w), 3)), r"alignment loss 1 must be .* int"),
        (lambda w: (jnp.sum(w), ()), "no alignment loss"),
        (lambda w: ((jnp.sum(w), jnp.sum(w)), w), "Then give has_aux=True"),
    ],
)
def test_losses_that_are_none_are_named(loss_fn, message):
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(gdmam.value_and_paired_grad(loss_fn), jnp.ones(3))


def test_whole_modules_are_pointed_to_what_takes_them():
    def loss_fn(model):
        return 0.0, 0.0

    with pytest.raises(TypeError, match=r"NNX module Linear; use the function.*gdmam_jax\.nnx"):
        gdmam.value_and_paired_grad(loss_fn)(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"activation is custom_jvp.*eqx\.partition\(model"):
        gdmam.value_and_paired_grad(loss_fn)(model)


def test_complex_gradients_and_pairs_taken_for_arrays_are_refused():
    with pytest.raises(TypeError, match=r"prediction gradient at w has dtype complex(64|128)"):
        gdmam.pair_gradients({"w": jnp.ones(2, complex)}, {"w": jnp.ones(2, complex)})
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    with pytest.raises(TypeError, match=r"over_pairs.*summed or weighed"):
        optax.apply_updates(PARAMS, optax.sgd(0.1).update(pairs, optax.sgd(0.1).init(PARAMS))[0])


@skipped_under("jax_disable_jit", "runs one branch, where the pairs do not meet the updates")
def test_multi_steps_around_gdmam_is_refused():
    steps = optax.MultiSteps(gdmam.gdmam(0.1), 2)
    with pytest.raises(TypeError, match="over_pairs"):
        steps.update(gdmam.pair_gradients(PARAMS, PARAMS), steps.init(PARAMS), PARAMS)
