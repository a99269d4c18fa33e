"""GDMAM inside `flax.nnx.Optimizer`; tests/test_nnx.py has the gradients."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad


class Model(nnx.Module):
    def __init__(self, rngs):
        self.trunk = nnx.Linear(3, 4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.trunk(x)))


BATCHES = jax.random.normal(jax.random.key(0), (8, 5, 3))


def losses(model, x):
    output = model(x)
    return jnp.mean((output - 1) ** 2), jnp.mean(jnp.abs(output))


def parts():
    return {"trunk": gdmam.gdmam(0.1), "head": gdmam.summed(optax.adam(0.1))}


# The optimizer for NNX, and the same for plain dictionaries where it is written differently.
OPTIMIZERS = {
    "gdmam": (gdmam.gdmam(0.1), None),
    "gdmam_released": (gdmam.gdmam_released(0.1), None),
    "allocate": (optax.chain(gdmam.allocate(), optax.adamw(0.1)), None),
    "scopes": (gdmam.gdmam(0.1, scope=gdmam.leaf_scope), None),
    "multi_steps": (
        gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1)),
        None,
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(gdmam.gdmam)(optax.linear_schedule(0.1, 0.0, 10)),
        None,
    ),
    "mask": (
        gdmam.gdmam(0.1, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
        None,
    ),
    # Labels form a prefix of the parameters, which are a State here.
    "partition": (
        optax.partition(parts(), nnx.State({"trunk": "trunk", "head": "head"})),
        optax.partition(parts(), {"trunk": "trunk", "head": "head"}),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_goes_the_way_of_plain_parameters(name):
    """Under one compiled step, without a change of types or a second compilation."""
    for_nnx, for_plain = OPTIMIZERS[name]
    model = Model(nnx.Rngs(0))
    graphdef, start = nnx.split(model, nnx.Param)
    plain = nnx.to_pure_dict(start)

    optimizer = nnx.Optimizer(model, for_nnx, wrt=nnx.Param)
    types = jax.tree.map(jax.typeof, nnx.state(optimizer))
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(None)
        values, pairs = value_and_paired_grad(losses)(model, x)
        optimizer.update(model, pairs)
        return values

    for x in BATCHES:
        step(model, optimizer, x)
    assert len(traces) == 1
    assert jax.tree.map(jax.typeof, nnx.state(optimizer)) == types

    transformation = for_plain or for_nnx

    def plain_losses(params, x):
        copy = nnx.clone(nnx.merge(graphdef, start))
        nnx.update(copy, nnx.State(params))
        return losses(copy, x)

    def plain_step(carry, x):
        params, state = carry
        _, pairs = gdmam.value_and_paired_grad(plain_losses)(params, x)
        updates, state = transformation.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(carry):
        return jax.lax.scan(plain_step, carry, BATCHES)[0]

    params, state = run((plain, transformation.init(plain)))
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), params, rtol=1e-3, atol=1e-5
    )
    found = gdmam.diagnostics(nnx.as_pure(optimizer.opt_state))
    expected = gdmam.diagnostics(state)
    if name != "partition":
        # With several states their paths in the optimizer's state are part of the names.
        chex.assert_trees_all_close(found, expected, rtol=1e-2, atol=1e-4)


def test_scope_functions_get_the_paths_of_variables():
    seen = set()

    def scope(path):
        seen.add(path)
        return path.split("/")[0]

    optimizer = nnx.Optimizer(Model(nnx.Rngs(0)), gdmam.scale_by_gdmam(scope=scope), wrt=nnx.Param)
    assert seen == {"trunk/kernel", "trunk/bias", "head/kernel", "head/bias"}
    assert "head/cosine" in gdmam.diagnostics(nnx.as_pure(optimizer.opt_state))


def test_jax_jit_with_functional_state():
    """Without `nnx.Optimizer`: split once, merge inside."""
    optimizer = gdmam.gdmam(0.1)
    model = Model(nnx.Rngs(0))
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def step(params, state, x):
        model = nnx.merge(graphdef, params)
        values, pairs = value_and_paired_grad(losses)(model, x)
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state, values

    state = optimizer.init(params)
    history = []
    for x in BATCHES:
        params, state, (prediction, _) = step(params, state, x)
        history.append(prediction)
    assert step._cache_size() == 1
    assert history[-1] < 0.5 * history[0]
