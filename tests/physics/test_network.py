"""The network's own derivatives against those that JAX takes."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks.physics.equations import EQUATIONS, derivatives
from benchmarks.physics.training import init, network

HEAT = EQUATIONS["heat"]


def first_params(sizes, frequencies=0, factorised=False):
    return jax.device_get(
        jax.jit(lambda key: init(key, sizes, frequencies, factorised))(jax.random.key(0))
    )


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
        first_params(sizes, frequencies, factorised),
    )
    points = np.random.default_rng(1).uniform(size=(6, 2))

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
    for layer, (rows, columns) in zip(first_params(sizes), itertools.pairwise(sizes), strict=True):
        kernel = np.asarray(layer["kernel"])
        assert kernel.shape == (rows, columns)
        assert layer["bias"].shape == (columns,)
        assert np.all(layer["bias"] == 0)
        # The deviation of a sample deviation is about 1 / sqrt(2 n).
        tolerance = 4 / np.sqrt(2 * rows * columns)
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (rows + columns)), rtol=tolerance)


def test_a_periodic_network_repeats_with_its_derivatives_and_sees_time_from_0_to_1(x64):
    params = first_params([3, 8, 1], 4)
    learned = jax.jit(network(params, EQUATIONS["allen-cahn"], periodic=True), static_argnums=1)
    times = np.linspace(0, 1, 5)
    ends = [learned(np.stack([0 * times + x, times], axis=1), (2, 1)) for x in (-1.0, 1.0)]
    for left, right in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-12)
    # The waves themselves, at x = 0.3, which is an angle of 0.3 pi.
    frequencies = params[0]["kernel"]
    inputs = np.array([np.cos(0.3 * np.pi), np.sin(0.3 * np.pi), 0.7])
    layers = [*params[:1], {"kernel": np.eye(8), "bias": np.zeros(8)}]
    waves = jax.jit(network(layers, EQUATIONS["allen-cahn"], periodic=True), static_argnums=1)
    seen = waves(np.array([[0.3, 0.7]]), (0, 0))[0][0][0]
    angle = inputs @ frequencies
    np.testing.assert_allclose(seen, np.concatenate([np.cos(angle), np.sin(angle)]), rtol=1e-12)


def test_factors_leave_the_first_kernels_as_they_are():
    plain = first_params([2, 200, 1])
    factorised = first_params([2, 200, 1], factorised=True)
    for one, other in zip(plain, factorised, strict=True):
        np.testing.assert_allclose(one["kernel"], other["kernel"] * other["factor"], rtol=1e-6)
        assert np.all(one["bias"] == other["bias"])
    factors = np.log(factorised[0]["factor"])
    np.testing.assert_allclose(factors.mean(), 0.5, atol=0.04)
    np.testing.assert_allclose(factors.std(), 0.1, rtol=0.25)
