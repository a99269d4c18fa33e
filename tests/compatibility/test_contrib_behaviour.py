"""What Optax asks of the optimizers it takes in, of GDMAM's two forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import example_pairs, example_params, train

OPTIMIZERS = {
    "gdmam": (lambda rate: gdmam.gdmam(rate, weight_decay=0.0), 0.05),
    "scale_by_gdmam": (
        lambda rate: optax.chain(gdmam.scale_by_gdmam(), optax.scale_by_learning_rate(rate)),
        0.02,
    ),
    "one-sided": (
        lambda rate: gdmam.gdmam(
            rate,
            weight_decay=0.0,
            gate=gdmam.conflict_gate,
            momentum=gdmam.relative_momentum,
            momenta="separate",
        ),
        0.05,
    ),
    "allocate": (lambda rate: optax.chain(gdmam.allocate(), optax.adam(rate)), 0.05),
    "gdmam_released": (
        lambda rate: gdmam.gdmam_released(rate, weight_decay=0.0, bias_weight_decay=0.0),
        0.01,
    ),
}


def squares(params, target):
    terms = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), params, target)
    return sum(jax.tree.leaves(terms))


def rosenbrock(params, target):
    del target
    return (1 - params[0]) ** 2 + 100 * (params[1] - params[0] ** 2) ** 2


PROBLEMS = {
    "parabola": (squares, jnp.array([-1.0, 10, 1]), jnp.array([1.0, -1, 1])),
    "rosenbrock": (rosenbrock, jnp.zeros(2), jnp.ones(2)),
    "mixed": (
        squares,
        {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3), "c": jnp.zeros(())},
        {"a": jnp.ones((2, 2)), "b": jnp.array([1.0, 2, 3]), "c": jnp.array(-1.0)},
    ),
}
SHIFT = 0.3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_convergence(problem, optimizer):
    """With an alignment loss that agrees, one that is absent, and one that conflicts."""
    loss, start, target = PROBLEMS[problem]
    make, rate = OPTIMIZERS[optimizer]
    steps = 10_000
    transformation = make(optax.cosine_decay_schedule(rate, steps))

    def losses(params, agree, conflict):
        prediction = loss(params, target)
        shifted = squares(params, jax.tree.map(lambda x: x + SHIFT, target))
        return prediction, agree * prediction + conflict * shifted

    @jax.jit
    @jax.vmap
    def run(agree, conflict):
        def step(carry, _):
            params, state = carry
            _, pairs = gdmam.value_and_paired_grad(losses)(params, agree, conflict)
            updates, state = transformation.update(pairs, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = start, transformation.init(start)
        (params, state), _ = jax.lax.scan(step, carry, length=steps)
        report = gdmam.diagnostics(state)
        distance = optax.tree.norm(jax.tree.map(jnp.subtract, params, target))
        other = jax.tree.map(lambda x, y: x - y - SHIFT, params, target)
        return distance, optax.tree.norm(other), loss(params, target), report

    (agrees, absent, conflicts), others, prediction, report = run(
        agree=jnp.array([0.5, 0, 0]), conflict=jnp.array([0.0, 0, 1])
    )
    tolerance = 0.05 if optimizer == "gdmam_released" else 1e-3
    assert agrees < tolerance
    assert absent < tolerance
    # Half of the way to the other loss's minimum, where both squares' gradients are equally long.
    halfway = SHIFT / 2 * optax.tree.size(target) ** 0.5
    if optimizer == "gdmam_released":
        # Norm weighting of whole gradients balances where both are equally long and opposed.
        assert report["cosine"][2] < -0.9
        chex.assert_trees_all_close(
            report["prediction_norm"][2], report["alignment_norm"][2], rtol=0.1
        )
        if problem != "rosenbrock":
            chex.assert_trees_all_close(conflicts, halfway, rtol=0.05)
    elif optimizer == "one-sided":
        if problem == "rosenbrock":
            # Along the valley's floor the prediction gradient is small against the conflict.
            assert prediction[2] < 0.02
        else:
            # The gate closes on the opposing part, and the prediction loss's minimum remains.
            assert conflicts < 0.1 * halfway
    else:
        # A compromise: no step from here is against neither loss.
        assert report["cosine"][2] < -0.99
        if problem != "rosenbrock":
            chex.assert_trees_all_close(conflicts + others[2], 2 * halfway, rtol=0.05)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64])
def test_no_recompilation_and_dtypes(optimizer, dtype, request):
    """`train` asserts one compilation, and updates and states of constant types."""
    if dtype == jnp.float64:
        request.getfixturevalue("x64")
    make, rate = OPTIMIZERS[optimizer]
    params = example_params(dtype)
    run = train({"it": make(rate)}, params, example_pairs(params, steps=4))["it"]
    chex.assert_tree_all_finite(run.params)
    statistics = gdmam.diagnostics(run.after(4)[1])
    wide = jnp.promote_types(dtype, jnp.float32)
    assert all(value.dtype == wide for value in statistics.values())


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "scopes"])
def test_state_types_are_stable_under_explicit_sharding(optimizer):
    if optimizer == "scopes":
        transformation = gdmam.gdmam(0.1, scope=gdmam.leaf_scope, amsgrad=True)
    else:
        make, rate = OPTIMIZERS[optimizer]
        transformation = make(rate)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    spec = {"kernel": jax.P("x", "y"), "bias": jax.P("y"), "scale": jax.P()}
    params = {"kernel": np.ones((8, 4)), "bias": np.ones(4), "scale": np.ones(())}
    with jax.set_mesh(mesh):
        params = jax.tree.map(
            lambda leaf, spec: jax.device_put(np.float32(leaf), jax.NamedSharding(mesh, spec)),
            params,
            spec,
        )
        state = jax.jit(transformation.init)(params)
        update = jax.jit(transformation.update)
        pairs = gdmam.pair_gradients(params, jax.tree.map(lambda leaf: 0.5 * leaf, params))
        updates, new_state = update(pairs, state, params)
        _, newer_state = update(pairs, new_state, params)

        def types(tree):
            return jax.tree.map(jax.typeof, tree)

        assert update._cache_size() == 1
        assert types(state) == types(new_state) == types(newer_state)
        assert types(updates) == types(params)
    # Nothing depends on where the arrays lie.

    @jax.jit
    def first(pairs, params):
        return transformation.update(pairs, transformation.init(params), params)[0]

    alone = first(*jax.device_get((pairs, params)))
    chex.assert_trees_all_close(jax.device_get(updates), jax.device_get(alone), rtol=1e-6)
