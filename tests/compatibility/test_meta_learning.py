"""GDMAM under `jax.vmap` (an ensemble in one program) and `jax.grad` (through its own steps)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

X = jax.random.normal(jax.random.key(1), (16, 3))
Y = jnp.sin(X.sum(axis=1))

OPTIMIZERS = {
    "relative": gdmam.gdmam(
        0.1,
        weighting=gdmam.balanced_weighting,
        gate=gdmam.conflict_gate,
        momentum=gdmam.relative_momentum,
        scope=gdmam.leaf_scope,
    ),
    "allocate": optax.chain(gdmam.allocate(), optax.adamw(0.1)),
    "multi_steps": gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1)),
}


def init(key):
    keys = jax.random.split(key)
    return {"a": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (4,))}


def losses(params, penalty=0.1):
    hidden = jnp.tanh(X @ params["a"])
    return jnp.mean((hidden @ params["b"] - Y) ** 2), penalty * jnp.mean(hidden**2)


def train(optimizer, params, steps=8, penalty=0.1):
    def step(carry, _):
        params, state = carry
        _, pairs = gdmam.value_and_paired_grad(losses)(params, penalty)
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_ensemble_in_one_program(name):
    """Each member as by itself: nothing mixes, neither geometry nor statistics."""
    optimizer = OPTIMIZERS[name]
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    def ensemble(keys):
        return jax.vmap(lambda key: train(optimizer, init(key)))(keys)

    params, states = jax.device_get(ensemble(keys))
    reports = gdmam.diagnostics(states)

    @jax.jit
    def alone(keys, number):
        return train(optimizer, init(keys[number]))

    for number in range(3):
        expected, state = alone(keys, number)
        member = jax.tree.map(lambda leaf, number=number: leaf[number], (params, reports))
        chex.assert_trees_all_close(
            member, (expected, gdmam.diagnostics(state)), rtol=2e-3, atol=1e-5
        )
    assert all(report.shape == (3,) for report in reports.values())


def with_momentum(initial, sensitivity):
    rule = gdmam.ratcheted_momentum(initial=initial, sensitivity=(0.05, 0.1, sensitivity))
    return gdmam.gdmam(0.1, momentum=rule)


MADE = {
    "gdmam": (gdmam.gdmam, 0.1),
    "gdmam_released": (gdmam.gdmam_released, 0.1),
    "momentum": (with_momentum, 0.9, 0.3),
}
"""Functions of numbers to an optimizer, and values of them."""


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MADE)
def test_gradient_through_a_few_steps(name):
    """What the loss after four steps owes to each hyperparameter and to the start."""
    make, *numbers = MADE[name]
    params = jax.tree.map(np.float64, jax.jit(init)(jax.random.key(0)))

    def final_loss(point):
        *numbers, scale = point
        start = optax.tree.scale(scale, params)
        return losses(train(make(*numbers), start, steps=4, penalty=2.0)[0])[0]

    # One program for the gradient and for the points beside it.
    there = np.array([*numbers, 1.0])
    steps = 1e-6 * np.eye(len(there))
    points = there + np.concatenate([np.zeros((1, len(there))), steps, -steps])
    values, gradients = jax.device_get(jax.jit(jax.vmap(jax.value_and_grad(final_loss)))(points))
    after, before = np.split(values[1:], 2)
    np.testing.assert_allclose(gradients[0], (after - before) / 2e-6, rtol=1e-5, atol=1e-9)
    assert np.abs(gradients[0][:-1]).min() > 1e-6
