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
    "gdmam": gdmam.gdmam(0.1),
    "relative": gdmam.gdmam(
        0.1,
        weighting=gdmam.balanced_weighting,
        gate=gdmam.conflict_gate,
        momentum=gdmam.relative_momentum,
        scope=gdmam.leaf_scope,
    ),
    "gdmam_released": gdmam.gdmam_released(0.1),
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


def hyperparameters_of(name):
    """Functions of one number to an optimizer, and a value of it."""
    if name == "gdmam_released":
        return lambda rate: gdmam.gdmam_released(rate), 0.1
    if name == "initial_momentum":
        return (
            lambda value: gdmam.gdmam(0.1, momentum=gdmam.anchored_momentum(initial=value)),
            0.9,
        )
    if name == "orthogonal_sensitivity":
        return lambda value: gdmam.gdmam(
            0.1, momentum=gdmam.ratcheted_momentum(sensitivity=(0.05, 0.1, value))
        ), 0.3
    return lambda rate: gdmam.gdmam(rate), 0.1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "name", ["gdmam", "gdmam_released", "initial_momentum", "orthogonal_sensitivity"]
)
def test_gradient_through_a_few_steps(name):
    """What the loss after four steps owes to a hyperparameter and to the start."""
    make, value = hyperparameters_of(name)
    params = jax.tree.map(np.float64, jax.jit(init)(jax.random.key(0)))

    def final_loss(value, scale):
        start = optax.tree.scale(scale, params)
        trained, _ = train(make(value), start, steps=4, penalty=2.0)
        return losses(trained)[0]

    # One program for the gradient and for the points beside it.
    points = [value, 1.0] + 1e-6 * np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]])
    both = jax.jit(jax.vmap(jax.value_and_grad(final_loss, argnums=(0, 1))))
    losses_there, gradients = jax.device_get(both(*points.T))
    gradient = [of_argument[0] for of_argument in gradients]
    expected = (losses_there[1:3] - losses_there[3:]) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)
    assert abs(gradient[0]) > 1e-6


@pytest.mark.parametrize("name", ["gdmam", "gdmam_released"])
def test_gradient_through_steps_without_any_gradient_is_finite(name):
    """At a stationary point of both losses every norm is zero, where a root has no derivative."""

    def final_loss(scale):
        params = {"a": scale * jnp.zeros((3, 4)), "b": jnp.zeros(4)}
        trained, _ = train(OPTIMIZERS[name], params, steps=3, penalty=0.0)
        return losses(trained)[0]

    assert jnp.isfinite(jax.jit(jax.grad(final_loss))(1.0))
