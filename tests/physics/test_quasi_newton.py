"""The quasi-Newton methods, alone and after others."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from benchmarks.physics.equations import EQUATIONS
from benchmarks.physics.quasi_newton import SOLVERS, minimise
from benchmarks.physics.training import SMALL, train

TINY = SMALL._replace(width=6, depth=2, residual_points=10, data_points=6, steps=200, records=4)
HEAT = EQUATIONS["heat"]


def bent(w):
    return jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)


@pytest.fixture(params=SOLVERS)
def solver(request):
    # Not imported here: without the benchmark's setting that makes float64 the default everywhere.
    if request.param == "ssbroyden" and not importlib.util.find_spec("ssbroyden_optimistix"):
        pytest.skip("ssbroyden-optimistix is not installed")
    return request.param


def test_each_finds_the_minimum_in_the_evaluations_that_it_counts(solver, x64):
    evaluations = []

    def counted(w):
        jax.debug.callback(lambda: evaluations.append(1))
        return bent(w)

    records = jax.jit(lambda w: minimise(solver, counted, w, 50, 4, lambda w: (w, bent(w))))(
        jnp.zeros(5)
    )
    jax.effects_barrier()
    points, values = map(np.asarray, records)
    np.testing.assert_allclose(points[-1], 1, atol=1e-6)
    assert np.all(np.diff(values) <= 0)
    # The value at the start is one more, and the last line search may go on.
    assert 200 <= len(evaluations) <= 225


def test_l_bfgs_is_that_of_the_recipe(x64):
    """`weighed(optax.lbfgs(), weighting)` with the weights frozen, as the documentation has it."""

    def losses(w):
        return jnp.sum((w - 1) ** 2), 100 * jnp.sum((w[:-1] - w[1:] ** 2) ** 2)

    weights, start = np.array([0.7, 0.2]), np.array([1.8, -0.6, 0.4])
    optimizer = gdmam.weighed(optax.lbfgs(), gdmam.constant_weighting(0.7, 0.2))

    @jax.jit
    def trained(start):
        state, step = SOLVERS["l-bfgs"](lambda w: weights @ jnp.stack(losses(w)), start)

        def both(number, carry):
            (w, theirs), (found, ours) = carry
            values, pairs = gdmam.value_and_paired_grad(losses)(w)
            updates, theirs = optimizer.update(
                pairs, theirs, w, value=values, grad=pairs, value_fn=losses
            )
            return (optax.apply_updates(w, updates), theirs), step(found, ours)[:2]

        carries = (start, optimizer.init(start)), (start, state)
        (w, _), (found, _) = jax.lax.fori_loop(0, 8, both, carries)
        return w, found

    w, found = jax.device_get(trained(start))
    assert np.max(np.abs(w - start)) > 0.1
    np.testing.assert_allclose(found, w, rtol=1e-6)


def test_a_quasi_newton_method_goes_on_where_another_ended():
    errors, cosines = train(HEAT, "l-bfgs after gdmam", [1e-2, 1e-2, 3e-3], [0, 1, 0], TINY, 3)
    assert errors.shape == (3, 4)
    assert len(np.unique(errors[:, -1])) == 3
    assert np.all(cosines[:, :2] != 0)
    np.testing.assert_array_equal(cosines[:, 2:], 0)


def test_alone_it_needs_no_rate_and_lowers_the_error():
    errors = train(HEAT, "l-bfgs", [1e-3, 1e-2, 1e-2, 1e-2, 1e-2], [0, 0, 1, 2, 3], TINY).errors
    np.testing.assert_array_equal(errors[0], errors[1])
    assert np.mean(errors[1:, -1]) < 0.95 * np.mean(errors[1:, 0])
