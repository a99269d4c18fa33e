"""Weightings with a memory or with values, in everything that a training may be made of."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import example_pairs
from tests.test_remembering import WEIGHTINGS

STEPS = 6


def losses(params, target):
    error = params["w"] @ params["v"] - target
    shifted = params["w"] + 1
    return jnp.mean(error**2) + 1, {"ic": jnp.mean(shifted**4), "bc": jnp.sum(params["v"] ** 2) + 1}


def pieces(name):
    """Parameters, targets of every step, and a step of a training with absent losses."""
    optimizer = gdmam.weighed(
        optax.sgd(0.01),
        WEIGHTINGS[name],
        alignment_losses=("ic", "bc"),
        not_finite="skip_loss",
    )
    params = {"w": jnp.linspace(-1, 1, 32).reshape(8, 4), "v": jnp.linspace(0.1, 1, 4)}
    targets = jax.device_get(jax.random.normal(jax.random.key(0), (STEPS, 8)))

    def step(carry, target):
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(losses)(params, target)
        present = (True, {"ic": target[0] > 0, "bc": True})
        updates, state = optimizer.update(pairs, state, params, present=present, value=values)
        return (optax.apply_updates(params, updates), state), None

    return optimizer, params, targets, step


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_scan_checkpoint_donation_vmap_sharding(name, tmp_path):
    optimizer, params, targets, step = pieces(name)

    def scan(carry, targets):
        return jax.lax.scan(step, carry, targets)[0]

    start = (params, optimizer.init(params))

    # Two trainings at once, their state donated.
    twice = jax.jit(jax.vmap(scan, in_axes=(0, None)), donate_argnums=0)
    doubled = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start)
    middle = twice(jax.device_put(doubled, jax.devices()[0]), targets[:3])
    # Saved in the middle and continued, bit for bit.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", middle)
    both = twice(middle, targets[3:])
    assert middle[0]["w"].is_deleted()
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.eval_shape(lambda: doubled))
    chex.assert_trees_all_equal(twice(restored, targets[3:]), both)
    chex.assert_tree_all_finite(both)

    # One alone, one donated step a call, its parameters over eight devices: traced once.
    mesh = jax.make_mesh((8,), ("x",))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P()))
    over = jax.tree.map(lambda leaf: split if leaf.shape == (8, 4) else whole, start)
    traces = []

    def counted(carry, target):
        traces.append(None)
        return step(carry, target)[0]

    donated = jax.jit(counted, donate_argnums=0)
    carry = jax.device_put(start, over)
    for target in targets:
        carry = donated(carry, target)
    assert len(traces) == 1
    alone = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), jax.device_get(carry))
    chex.assert_trees_all_close(alone, jax.device_get(both), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_no_array_is_in_a_first_state_twice(name):
    """JAX refuses to donate it."""
    optimizer, params, *_ = pieces(name)
    arrays = jax.tree.leaves((params, optimizer.init(params)))
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_each_scope_remembers_for_itself(name):
    """And one scope of several gets what it would get alone."""
    link = gdmam.allocate(WEIGHTINGS[name], gdmam.open_gate, scope=gdmam.leaf_scope)
    alone = gdmam.allocate(WEIGHTINGS[name], gdmam.open_gate)
    params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
    state, single = link.init(params), alone.init(params["b"])

    @jax.jit
    def update(pairs, state, single, value):
        _, state = link.update(pairs, state, value=value)
        return state, alone.update(pairs["b"], single, value=value)[1]

    drawn = example_pairs(params, steps=3)
    for step in range(3):
        value = (1.0 + step, 2.0 / (1 + step))
        pairs = jax.tree.map(lambda leaf, step=step: leaf[step], drawn)
        state, single = update(pairs, state, single, value)
        np.testing.assert_allclose(state.weights[1], single.weights, rtol=1e-4)
