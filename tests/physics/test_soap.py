"""SOAP beside a PyTorch package's, on recorded gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.physics.soap import scale_by_soap

torch = pytest.importorskip("torch")
STEPS = 40


@pytest.fixture(scope="module")
def recorded():
    """Gradients of a small problem along plain Adam; matrices of full rank, so that bases are."""
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(6, 6)), "bias": random.normal(size=6)}
    inputs = random.normal(size=(30, 6)) * np.logspace(0, -1.5, 6)
    targets = np.tanh(inputs @ random.normal(size=(6, 6)))

    def loss(params):
        return jnp.mean((jnp.tanh(inputs @ params["kernel"] + params["bias"]) - targets) ** 2)

    optimizer = optax.adam(3e-2)

    def step(carry, _):
        params, state = carry
        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), gradient

    with jax.enable_x64(True):
        run = jax.jit(
            lambda start: jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)[1]
        )
        return jax.device_get(run(params))


def theirs(recorded, every):
    from pytorch_optimizer import SOAP

    names = sorted(recorded)
    params = [torch.nn.Parameter(torch.zeros(recorded[name].shape[1:]).double()) for name in names]
    optimizer = SOAP(params, lr=1.0, weight_decay=0.0, precondition_frequency=every)
    found = []
    for number in range(STEPS):
        before = [param.detach().clone() for param in params]
        for name, param in zip(names, params, strict=True):
            param.grad = torch.tensor(recorded[name][number])
        optimizer.step()
        found.append(
            [(old - new).detach().numpy() for old, new in zip(before, params, strict=True)]
        )
    return found


@pytest.mark.parametrize("every", [1, 2, 5])
def test_soap_is_that_of_a_pytorch_package(every, recorded, x64):
    """Its bases come from a decomposition in float32, whatever the gradients' dtype."""
    pytest.importorskip("pytorch_optimizer")
    optimizer = scale_by_soap(every=every)
    state = optimizer.init(jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:]), recorded))
    update = jax.jit(optimizer.update)
    for number, expected in enumerate(theirs(recorded, every)):
        gradient = jax.tree.map(lambda leaf, number=number: leaf[number], recorded)
        found, state = update(gradient, state)
        for ours, other in zip(jax.tree.leaves(found), expected, strict=True):
            assert (np.max(np.abs(other)) > 1e-3) == (number > 0)
            np.testing.assert_allclose(ours, other, rtol=0, atol=2e-4)


def test_without_bases_soap_is_adam(x64):
    optimizer, adam = scale_by_soap(), optax.scale_by_adam(0.95, 0.95)
    random = np.random.default_rng(0)
    update, update_adam = jax.jit(optimizer.update), jax.jit(adam.update)
    state, other = optimizer.init(np.ones(4)), adam.init(np.ones(4))
    found, state = update(np.ones(4), state)
    np.testing.assert_array_equal(found, 0)
    for gradient in random.normal(size=(5, 4)):
        found, state = update(gradient, state)
        expected, other = update_adam(gradient, other)
        # Adam adds its constant to the corrected root.
        np.testing.assert_allclose(found, expected, rtol=1e-6)
