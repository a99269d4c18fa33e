"""Models of other libraries: Equinox modules (None leaves) and Haiku's nested dictionaries."""

import chex
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import example_pairs, train

X = jax.random.normal(jax.random.key(1), (16, 3))
Y = jnp.sin(X.sum(axis=1, keepdims=True))

OPTIMIZERS = {
    "gdmam": gdmam.gdmam(0.05, amsgrad=True),
    "gdmam_released": gdmam.gdmam_released(0.005),
    "allocate": optax.chain(gdmam.allocate(), optax.adamw(0.05)),
    "scopes": gdmam.gdmam(0.05, scope=lambda path: path.split("/")[1]),
    "apply_if_finite": gdmam.over_pairs(lambda tx: optax.apply_if_finite(tx, 3), gdmam.gdmam(0.05)),
}


def losses_of(output):
    return jnp.mean((output - Y) ** 2), jnp.mean(output**2)


@pytest.mark.parametrize("name", ["gdmam", "allocate", "scopes"])
def test_equinox(name):
    """What is not differentiated is None, in parameters, pairs, state and updates alike."""
    optimizer = OPTIMIZERS[name]
    model = eqx.nn.MLP(3, 1, 8, 1, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert None in jax.tree.leaves(params, is_leaf=lambda leaf: leaf is None)

    def losses(params):
        return losses_of(jax.vmap(eqx.combine(params, static))(X))

    def step(carry, _):
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(losses)(params)
        updates, state = optimizer.update(pairs, state, params)
        return (eqx.apply_updates(params, updates), state), values

    @jax.jit
    def run(carry):
        return jax.lax.scan(step, carry, length=40)

    start = params, optimizer.init(params)
    middle, (early, _) = run(start)
    end, (late, _) = run(middle)
    assert run._cache_size() == 1
    assert jax.tree.map(jax.typeof, end) == jax.tree.map(jax.typeof, start)
    assert late[-1] < 0.3 * early[0]
    trained = eqx.combine(end[0], static)
    chex.assert_trees_all_close(losses(end[0]), losses_of(jax.vmap(trained)(X)))


@pytest.mark.parametrize("name", ["gdmam", "gdmam_released", "apply_if_finite"])
def test_equinox_goes_the_way_of_its_list_of_arrays(name):
    model = eqx.nn.MLP(3, 1, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    pairs = example_pairs(params)
    # A list has no names, and what is a bias the released form finds by name.
    names = [
        jax.tree_util.keystr(path, simple=True, separator="_")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    structure = jax.tree.structure(params)
    runs = train(
        {"module": OPTIMIZERS[name], "plain": OPTIMIZERS[name]},
        {"module": params, "plain": dict(zip(names, structure.flatten_up_to(params), strict=True))},
        {"module": pairs, "plain": dict(zip(names, structure.flatten_up_to(pairs), strict=True))},
    )
    found = dict(zip(names, jax.tree.leaves(runs["module"].params), strict=True))
    chex.assert_trees_all_close(found, runs["plain"].params, rtol=1e-5)


@pytest.mark.parametrize("name", ["gdmam", "gdmam_released", "scopes"])
def test_haiku(name):
    """Nested dictionaries with slashes in their keys."""
    optimizer = OPTIMIZERS[name]
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 1])(x)))
    params = network.init(jax.random.key(0), X)
    assert "mlp/~/linear_0" in params

    def losses(params):
        return losses_of(network.apply(params, X))

    def step(carry, _):
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(losses)(params)
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), values

    @jax.jit
    def run(carry):
        return jax.lax.scan(step, carry, length=40)

    start = params, optimizer.init(params)
    middle, (early, _) = run(start)
    end, (late, _) = run(middle)
    assert run._cache_size() == 1
    assert jax.tree.map(jax.typeof, end) == jax.tree.map(jax.typeof, start)
    assert late[-1] < (0.9 if name == "gdmam_released" else 0.5) * early[0]


def test_scopes_by_haiku_module_and_equinox_layer():
    params = {"mlp/~/linear_0": {"w": jnp.ones(2), "b": jnp.ones(1)}, "head": {"w": jnp.ones(1)}}
    state = gdmam.scale_by_gdmam(scope=lambda path: path.rsplit("/", 1)[0]).init(params)
    assert {key.rsplit("/", 1)[0] for key in gdmam.diagnostics(state)} == {
        "mlp/~/linear_0",
        "head",
    }


def test_fields_called_value_keep_their_name():
    """NNX variables hold their arrays in an attribute of that name, which is left out of paths."""

    class Gate(eqx.Module):
        value: jax.Array
        bias: jax.Array

    params = {"gate": Gate(jnp.ones(2), jnp.ones(2)), "head": Gate(jnp.ones(2), jnp.ones(2))}
    state = gdmam.scale_by_gdmam(scope=gdmam.leaf_scope).init(params)
    assert {key.rsplit("/", 1)[0] for key in gdmam.diagnostics(state)} == {
        f"{layer}/{field}" for layer in params for field in ("value", "bias")
    }
    pairs = jax.tree.map(lambda leaf: gdmam.GradientPair(leaf, leaf[:1]), params)
    with pytest.raises(ValueError, match="gradients at gate/value must agree"):
        gdmam.scale_by_gdmam().update(pairs, state)


def test_labels_of_a_module_are_given_by_a_function():
    """A label tree that is a module can be called, and Optax calls what can be called."""
    model = eqx.nn.Linear(3, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    labels = eqx.tree_at(lambda m: (m.weight, m.bias), params, ("matrix", "rest"))
    parts = {"matrix": gdmam.gdmam(0.1), "rest": gdmam.summed(optax.sgd(1.0))}
    optimizer = optax.partition(parts, lambda _: labels)
    pairs = gdmam.pair_gradients(params, params)
    updates, _ = jax.jit(optimizer.update)(pairs, optimizer.init(params), params)
    chex.assert_trees_all_close(updates.bias, -2 * np.asarray(params.bias))
    assert not np.allclose(updates.weight, -2 * np.asarray(params.weight))
    with pytest.raises(TypeError):
        optax.partition(parts, labels).init(params)
