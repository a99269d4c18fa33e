"""The network's own derivatives against those that JAX takes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.physics.equations import EQUATIONS, derivatives
from benchmarks.physics.training import init, network

HEAT = EQUATIONS["heat"]


def test_derivatives_are_those_of_nested_forward_mode_and_the_hessian(x64):
    sizes, orders = [2, 5, 4, 3], (1, 4)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape), init(jax.random.key(0), sizes)
    )
    points = jnp.asarray(np.random.default_rng(1).uniform(size=(6, 2)))

    @jax.jit
    def found(points):
        learned = network(params, HEAT)

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
