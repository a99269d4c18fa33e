"""The network's own derivatives against those that JAX takes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.physics.equations import EQUATIONS, derivatives
from benchmarks.physics.training import init, network

HEAT = EQUATIONS["heat"]


@pytest.mark.parametrize(
    ("periodic", "frequencies", "factorised"), [(False, 0, False), (True, 3, True)]
)
def test_derivatives_are_those_of_nested_forward_mode_and_the_hessian(
    periodic, frequencies, factorised, x64
):
    sizes, orders = [2 + periodic, 5, 4, 3], (1, 4)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape),
        init(jax.random.key(0), sizes, frequencies, factorised),
    )
    points = jnp.asarray(np.random.default_rng(1).uniform(size=(6, 2)))

    @jax.jit
    def found(points):
        learned = network(params, HEAT, periodic)

        def values(x):
            return learned(x, (0, 0))[0][0]

        nested = [derivatives(values, points, axis, order) for axis, order in enumerate(orders)]
        hessian = jax.vmap(jax.hessian(lambda x: values(x[None])[0]))(points)
        return learned(points, orders), learned(points, (2, 2)), nested, hessian

    along, seconds, nested, hessian = found(points)
    assert [len(each) - 1 for each in along] == list(orders)
    for ours, theirs in zip(along, nested, strict=True):
        for each, other in zip(ours, theirs, strict=True):
            assert each.shape == (6, 3)
            assert np.min(np.max(np.abs(other), axis=0)) > 1e-3
            np.testing.assert_allclose(each, other, rtol=1e-11, atol=1e-12)
    for axis in range(2):
        np.testing.assert_allclose(seconds[axis][2], hessian[..., axis, axis], rtol=1e-10)


def test_layers_start_as_glorot_says():
    sizes = [2, 300, 100, 1]
    for layer, (rows, columns) in zip(
        init(jax.random.key(0), sizes), itertools.pairwise(sizes), strict=True
    ):
        kernel = np.asarray(layer["kernel"])
        assert kernel.shape == (rows, columns)
        assert layer["bias"].shape == (columns,)
        assert np.all(layer["bias"] == 0)
        # The deviation of a sample deviation is about 1 / sqrt(2 n).
        tolerance = 4 / np.sqrt(2 * rows * columns)
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (rows + columns)), rtol=tolerance)


def test_a_periodic_network_repeats_with_its_derivatives_and_sees_time_from_0_to_1(x64):
    params = init(jax.random.key(0), [3, 8, 1], 4)
    learned = network(params, EQUATIONS["allen-cahn"], periodic=True)
    times = jnp.linspace(0, 1, 5)
    ends = [learned(jnp.stack([0 * times + x, times], axis=1), (2, 1)) for x in (-1.0, 1.0)]
    for left, right in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-12)
    # The waves themselves, at x = 0.3, which is an angle of 0.3 pi.
    frequencies = params[0]["kernel"]
    inputs = jnp.array([jnp.cos(0.3 * jnp.pi), jnp.sin(0.3 * jnp.pi), 0.7])
    layers = [*params[:1], {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}]
    seen = network(layers, EQUATIONS["allen-cahn"], periodic=True)(jnp.array([[0.3, 0.7]]), (0, 0))[
        0
    ][0][0]
    angle = inputs @ frequencies
    np.testing.assert_allclose(seen, jnp.concatenate([jnp.cos(angle), jnp.sin(angle)]), rtol=1e-12)


def test_factors_leave_the_first_kernels_as_they_are():
    plain = init(jax.random.key(0), [2, 200, 1])
    factorised = init(jax.random.key(0), [2, 200, 1], factorised=True)
    for one, other in zip(plain, factorised, strict=True):
        np.testing.assert_allclose(one["kernel"], other["kernel"] * other["factor"], rtol=1e-6)
        assert np.all(one["bias"] == other["bias"])
    factors = np.log(factorised[0]["factor"])
    np.testing.assert_allclose(factors.mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(factors.std(), 0.1, rtol=0.25)
