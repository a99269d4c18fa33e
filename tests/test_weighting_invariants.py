"""What weightings owe their users, over random gradients in float64.

They do not care in which order the alignment losses come, answer a change of scale as documented,
and are against no loss where they promise it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gdmam_jax as gdmam

WEIGHTINGS = {
    "sum": gdmam.sum_weighting,
    "mean": gdmam.mean_weighting,
    "norm": gdmam.norm_weighting,
    "balanced": gdmam.balanced_weighting,
    "unit": gdmam.unit_weighting,
    "pcgrad": gdmam.pcgrad_weighting,
    "mgda": gdmam.mgda_weighting,
    "cagrad": gdmam.cagrad_weighting,
    "imtl_g": gdmam.imtl_g_weighting,
    "nash_mtl": gdmam.nash_mtl_weighting,
    "aligned_mtl": gdmam.aligned_mtl_weighting,
    "config": gdmam.config_weighting,
    "upgrad": gdmam.upgrad_weighting,
    "dual_proj": gdmam.dual_proj_weighting,
    "fairgrad": gdmam.fairgrad_weighting,
    "dcgd": gdmam.dcgd_weighting(direction="average"),
}
COUNTS = (2, 3)
ALWAYS_SOLVED = ("cagrad", "nash_mtl", "dual_proj", "fairgrad")
"""No closed form for two losses: three say as much, and each compilation of a solver takes time."""
PROPERTY = settings(max_examples=20)


@functools.cache
def compiled(name):
    return jax.jit(WEIGHTINGS[name])


def weights_of(name, gradients):
    """In float64, with running means that have followed the norms."""
    with jax.enable_x64(True):
        norms = np.linalg.norm(gradients, axis=1)
        return np.asarray(compiled(name)(jnp.asarray(gradients @ gradients.T), jnp.asarray(norms)))


def counts(name):
    return (3,) if name in ALWAYS_SOLVED else (2,) if name == "dcgd" else COUNTS


def result_of(name, gradients):
    return weights_of(name, gradients) @ gradients


def assert_close(found, expected, gradients, tolerance=1e-6):
    scale = max(np.linalg.norm(expected), 1e-3 * np.linalg.norm(gradients, axis=1).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@st.composite
def gradient_sets(draw, counts=COUNTS, independent=True):
    """Random gradients, more or less conflicting, of norms within a factor of a hundred.

    Those that need not be independent may have fewer dimensions than losses, or add up to 0.
    """
    count = draw(st.sampled_from(counts))
    dimensions = 6 if independent else draw(st.sampled_from((2, 6)))
    conflict = draw(st.floats(0, 0.9) if independent else st.sampled_from((0.0, 0.5, 1.0)))
    exponents = draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count))
    rows = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(count, dimensions))
    rows = rows - conflict * rows.mean(axis=0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * 10.0 ** np.array(exponents)[:, None]


@pytest.mark.parametrize("name", WEIGHTINGS)
@PROPERTY
@given(data=st.data())
def test_the_order_of_the_losses_does_not_matter(name, data):
    # Fixed-order PCGrad beyond two losses is the one that depends on it.
    gradients = data.draw(gradient_sets((2,) if name == "pcgrad" else counts(name)))
    order = np.array(data.draw(st.permutations(range(len(gradients)))))
    assert_close(result_of(name, gradients[order]), result_of(name, gradients), gradients)


@pytest.mark.parametrize("name", WEIGHTINGS)
@PROPERTY
@given(data=st.data(), exponent=st.floats(-6, 6))
def test_the_result_scales_as_all_gradients_do(name, data, exponent):
    gradients = data.draw(gradient_sets(counts(name)))
    scale = 10.0**exponent
    expected = result_of(name, gradients)
    if name not in ("unit", "nash_mtl"):  # These two are free of all scales.
        # FairGrad's gains are the inverse roots of its weights.
        expected = scale ** (-1 / 3 if name == "fairgrad" else 1) * expected
    assert_close(result_of(name, scale * gradients), expected, scale * gradients)


@pytest.mark.parametrize("name", ["unit", "nash_mtl", "balanced", "imtl_g", "config"])
@PROPERTY
@given(data=st.data())
def test_the_direction_is_free_of_each_scale(name, data):
    # Beyond two losses the direction of IMTL-G may change its sign.
    gradients = data.draw(gradient_sets((2,) if name == "imtl_g" else counts(name)))
    scales = 10.0 ** np.array([data.draw(st.floats(-2, 2)) for _ in gradients])
    one, other = (result_of(name, g) for g in (gradients, scales[:, None] * gradients))
    if name not in ("unit", "nash_mtl"):
        one, other = (result / np.linalg.norm(result) for result in (one, other))
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * np.linalg.norm(one))


@PROPERTY
@given(gradients=gradient_sets(), data=st.data())
def test_upgrad_is_linear_in_the_losses_scales(gradients, data):
    first, second = (
        10.0 ** np.array([data.draw(st.floats(-1, 1)) for _ in gradients])[:, None]
        for _ in range(2)
    )
    parts = result_of("upgrad", first * gradients) + result_of("upgrad", second * gradients)
    assert_close(result_of("upgrad", (first + second) * gradients), parts, gradients)


def assert_against_none(name, gradients):
    result = result_of(name, gradients)
    lengths = np.linalg.norm(gradients, axis=1)
    # A part of what the gradients alone could do: where they add up to 0, so does the result.
    assert np.min(gradients @ result / lengths) >= -1e-6 * max(
        np.linalg.norm(result), lengths.max()
    )


@pytest.mark.parametrize("name", ["mgda", "upgrad", "dual_proj"])
@PROPERTY
@given(data=st.data())
def test_against_no_loss_whatever_the_gradients(name, data):
    assert_against_none(name, data.draw(gradient_sets(counts(name), independent=False)))


@pytest.mark.parametrize("name", ["nash_mtl", "config", "fairgrad"])
@PROPERTY
@given(data=st.data())
def test_against_no_loss_of_independent_gradients(name, data):
    assert_against_none(name, data.draw(gradient_sets(counts(name))))


@pytest.mark.parametrize("name", ["balanced", "unit", "pcgrad", "imtl_g", "dcgd"])
@PROPERTY
@given(gradients=gradient_sets((2,)))
def test_against_neither_of_two_losses(name, gradients):
    assert_against_none(name, gradients)


@PROPERTY
@given(gradients=gradient_sets((3,)))
def test_cagrad_is_not_against_the_mean_loss(gradients):
    result = result_of("cagrad", gradients)
    mean = gradients.mean(axis=0)
    # By no more than c = 1/2 from the mean gradient: |d - g| <= c |g|.
    assert mean @ result >= (0.5 - 1e-6) * (mean @ mean)


@functools.cache
def training():
    """Three steps of GDMAM with three alignment losses, compiled once: ``pairs -> updates``."""
    optimizer = gdmam.gdmam(0.1, momentum=gdmam.relative_momentum, alignment_losses=3)

    def step(state, gradients):
        prediction, *others = gradients
        pair = gdmam.GradientPair(prediction, tuple(others))
        update, state = optimizer.update(pair, state, jnp.ones_like(prediction))
        return state, update

    @jax.jit
    def run(gradients):
        return jax.lax.scan(step, optimizer.init(gradients[0, 0]), gradients)[1]

    return run


@PROPERTY
@given(
    sets=st.lists(gradient_sets((4,)), min_size=3, max_size=3),
    order=st.permutations(range(3)),
    exponents=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
)
def test_gdmam_is_free_of_the_order_and_scales_of_its_losses(sets, order, exponents):
    gradients = np.stack(sets)
    changed = gradients[:, [0, *(1 + np.array(order))]] * 10.0 ** np.array(exponents)[:, None]
    with jax.enable_x64(True):
        found, expected = (np.asarray(training()(g)) for g in (changed, gradients))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
