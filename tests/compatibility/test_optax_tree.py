"""`optax.tree` on pairs and on states."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import example_pairs, example_params


def one_pair():
    return jax.tree.map(lambda leaf: leaf[0], example_pairs())


def test_arithmetic_on_pairs_is_arithmetic_on_both_gradients():
    pairs = one_pair()
    prediction, alignment = gdmam.unpair_gradients(pairs)

    def both(function):
        return gdmam.pair_gradients(function(prediction), function(alignment))

    found = {
        "scale": optax.tree.scale(2.0, pairs),
        "add": optax.tree.add(pairs, pairs),
        "add_scale": optax.tree.add_scale(pairs, 3.0, pairs),
        "zeros_like": optax.tree.zeros_like(pairs),
        "cast": optax.tree.cast(pairs, jnp.bfloat16),
        "where": optax.tree.where(jnp.array(True), pairs, optax.tree.zeros_like(pairs)),
    }
    expected = {
        "scale": both(lambda tree: optax.tree.scale(2.0, tree)),
        "add": both(lambda tree: optax.tree.scale(2.0, tree)),
        "add_scale": both(lambda tree: optax.tree.scale(4.0, tree)),
        "zeros_like": both(optax.tree.zeros_like),
        "cast": both(lambda tree: optax.tree.cast(tree, jnp.bfloat16)),
        "where": pairs,
    }
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_close(
        optax.tree.norm(pairs) ** 2,
        optax.tree.norm(prediction) ** 2 + optax.tree.norm(alignment) ** 2,
        rtol=1e-6,
    )
    assert optax.tree.size(pairs) == 2 * optax.tree.size(prediction)


def test_get_and_set_of_injected_numbers():
    optimizer = optax.inject_hyperparams(gdmam.gdmam)(0.1, weight_decay=0.0)
    params = example_params()
    state = optimizer.init(params)
    assert optax.tree.get(state, "learning_rate") == jnp.float32(0.1)
    doubled = optax.tree.set(state, learning_rate=jnp.float32(0.2))
    updates = [optimizer.update(one_pair(), start, params)[0] for start in (state, doubled)]
    chex.assert_trees_all_close(optax.tree.scale(2.0, updates[0]), updates[1], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [gdmam.gdmam(0.1), gdmam.gdmam_released(0.1)])
def test_get_does_not_look_inside_dataclasses_but_diagnostics_does(optimizer):
    state = optimizer.init(example_params())
    assert optax.tree.get(state, "allocation") is None
    assert gdmam.diagnostics(state)["prediction_momentum"] == 1
    assert state[0].statistics.momentum.shape == (3,)


def test_states_are_ordinary_trees():
    """Buffers as bfloat16 for storage and back, a running mean over states, and the like."""
    optimizer = gdmam.gdmam(0.1, scope=gdmam.leaf_scope)
    params = example_params()
    _, state = jax.jit(optimizer.update)(one_pair(), optimizer.init(params), params)
    stored = optax.tree.map_params(optimizer, lambda leaf: leaf.astype(jnp.bfloat16), state)
    assert jax.tree.structure(stored) == jax.tree.structure(state)
    restored = optax.tree.cast_like(stored, state)
    chex.assert_trees_all_close(restored, state, rtol=1e-2)
    chex.assert_trees_all_equal_dtypes(restored, state)
    chex.assert_trees_all_equal(optax.tree.where(jnp.array(True), state, restored), state)
