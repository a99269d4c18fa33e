"""Losses and measures against their definitions in float64 NumPy, and at the simplex's edge."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdmam_jax.ldl import losses, measures

FLOOR = 1e-14


def distributions(samples, labels, seed):
    """Rows that sum to 1, some entries exactly 0, one row exactly one-hot."""
    rng = np.random.default_rng(seed)
    rows = rng.dirichlet(np.full(labels, 0.7), samples)
    rows[rng.uniform(size=rows.shape) < 0.2] = 0
    rows[rows.sum(1) == 0, 0] = 1
    rows /= rows.sum(1, keepdims=True)
    rows[0] = np.eye(labels)[1]
    return rows


def log_ratio(a, b):
    return np.log(np.maximum(a / np.maximum(b, FLOOR), FLOOR))


def kl(p, y):
    return (y * log_ratio(y, p)).sum(1)


def relative(p, y):
    return (y - p) / np.maximum(y + p, FLOOR)


PER_SAMPLE = {
    losses.kullback_leibler: kl,
    losses.jensen_shannon: lambda p, y: (kl((p + y) / 2, y) + kl((p + y) / 2, p)) / 2,
    losses.squared: lambda p, y: ((p - y) ** 2).sum(1),
    measures.chebyshev: lambda p, y: np.abs(p - y).max(1),
    measures.clark: lambda p, y: np.sqrt((relative(p, y) ** 2).sum(1)),
    measures.canberra: lambda p, y: np.abs(relative(p, y)).sum(1),
    measures.cosine: lambda p, y: (
        (p * y).sum(1) / (np.linalg.norm(p, axis=1) * np.linalg.norm(y, axis=1))
    ),
    measures.intersection: lambda p, y: np.minimum(p, y).sum(1),
    measures.euclidean: lambda p, y: np.linalg.norm(p - y, axis=1),
}


@pytest.mark.parametrize("function", PER_SAMPLE, ids=lambda f: f.__name__)
def test_agrees_with_its_definition(x64, function):
    p, y = distributions(40, 6, 0), distributions(40, 6, 1)
    weights = np.random.default_rng(2).uniform(0, 2, 40)
    expected = PER_SAMPLE[function](p, y)
    plain, weighted = jax.jit(lambda *args: (function(*args[:2]), function(*args)))(p, y, weights)
    np.testing.assert_allclose(plain, expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(weighted, (weights * expected).sum() / weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("function", PER_SAMPLE, ids=lambda f: f.__name__)
def test_gradients_are_finite_at_exactly_0_and_1(function):
    corners = np.eye(3, dtype=np.float32)
    rows = np.concatenate([corners, np.zeros((1, 3), np.float32), np.full((1, 3), 1 / 3)])
    p, y = (rows[i.ravel()].astype(np.float32) for i in np.indices((5, 5)))
    for gradient in jax.jit(jax.grad(function, (0, 1)))(p, y):
        assert np.isfinite(gradient).all()


REWEIGHTINGS = {
    "none": lambda f, y: np.ones_like(y),
    "inverse": lambda f, y: np.broadcast_to((1 / f) / (1 / f).mean(), y.shape),
    "sqrt_inverse": lambda f, y: np.broadcast_to(f**-0.5 / (f**-0.5).mean(), y.shape),
    "class_balanced": lambda f, y: np.broadcast_to(
        (0.1 / (1 - 0.9**f)) / (0.1 / (1 - 0.9**f)).mean(), y.shape
    ),
    "rebalanced": lambda f, y: (
        1 / (1 + np.exp(-10 * ((1 / f) / (y / f).sum(1, keepdims=True) - 0.9))) + 0.1
    ),
}


@pytest.mark.parametrize("reweighting", REWEIGHTINGS)
@pytest.mark.parametrize(("gamma", "bias", "scale"), [(2.0, 0.05, 2.0), (0.0, 0.0, 1.0)])
def test_distribution_balanced_family(x64, reweighting, gamma, bias, scale):
    y = distributions(30, 5, 3)
    z = np.random.default_rng(4).normal(0, 3, y.shape)
    f = y.sum(0)
    w = REWEIGHTINGS[reweighting](f, y)
    shifted = z - bias * np.log(len(y) / f - 1)
    shifted = y * shifted + (1 - y) * scale * shifted
    w = y * w + (1 - y) * w / scale
    p = np.exp(shifted) / np.exp(shifted).sum(1, keepdims=True)
    expected = ((1 - p) ** gamma * w * y * log_ratio(y, p)).mean()
    options = {"focal_gamma": gamma, "logit_bias": bias, "negative_scale": scale}
    # Padding does not count, in the frequency nor in the mean.
    padded = np.concatenate([z, z[:7] + 1]), np.concatenate([y, y[:7]]), np.arange(37) < 30

    @jax.jit
    def loss(z, y, mask=None):
        count = len(y) if mask is None else mask.sum()
        frequency = losses.class_frequency(y, mask)
        return losses.distribution_balanced(
            z, y, frequency, count, mask, reweighting=reweighting, **options
        )

    for found in (loss(z, y), loss(*padded)):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("reweighting", REWEIGHTINGS)
def test_distribution_balanced_gradients_are_finite(reweighting):
    eye = np.eye(4, dtype=np.float32)
    y = np.concatenate([eye[:3], np.full((1, 4), 0.25, np.float32)])  # label 3 is rare
    gradient = jax.jit(
        lambda z, y: jax.grad(losses.distribution_balanced)(
            z, y, losses.class_frequency(y), 4, reweighting=reweighting
        )
    )
    for z in (0 * eye, 1e4 * eye, -1e4 * eye):
        assert np.isfinite(gradient(z, y)).all()


def test_effective_numbers_of_rare_labels_do_not_cancel():
    """(1 - b) / (1 - b^f) is (1 - b) / (-f log b) to first order in f, and 1 for b = 0."""
    frequency = jnp.array([1e-8, 1e-6, 1.0])
    for beta in (0.9, 0.9999):
        weights = losses._per_class("class_balanced", frequency, beta)
        expected = [(1 - beta) / (-f * np.log(beta)) for f in (1e-8, 1e-6)]
        np.testing.assert_allclose(weights, [*expected, 1], rtol=1e-5)
    assert losses._per_class("class_balanced", frequency, 0.0).tolist() == [1, 1, 1]


def test_weights_of_integers_are_not_cut_off():
    assert losses.weighted_mean(jnp.array([1, 3]), jnp.array([0.5, 1.5])) == 2.5


def test_exact_matches_score_in_half_precision():
    """There the floor of float32 is 0."""
    y = distributions(10, 4, 10).astype(np.float16)
    for name, value in jax.jit(measures.measure)(y, y).items():
        assert value.dtype == np.float16
        assert value == pytest.approx(float(name in measures.HIGHER_IS_BETTER), abs=2e-3)
    never = jnp.zeros((1, 2), jnp.float16), jnp.array([[1.0, 0.0]], jnp.float16)
    assert np.isfinite(losses.distribution_balanced(*never, jnp.ones(2, jnp.float16), 1))


def test_a_label_that_never_or_always_occurs_is_no_infinity():
    y = jnp.array([[1.0, 0.0], [1.0, 0.0]])  # N / f - 1 is 0 for the first, f is 0 for the second
    frequency = losses.class_frequency(y)
    assert frequency.tolist() == [2, 1]
    loss = jax.jit(jax.value_and_grad(losses.distribution_balanced), static_argnums=3)
    value, gradient = loss(jnp.zeros((2, 2)), y, frequency, 2)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_wrong_options_are_refused():
    y = jnp.full((2, 2), 0.5)
    with pytest.raises(ValueError, match="focal_gamma must be 0 or at least 1"):
        losses.distribution_balanced(y, y, y[0], 2, focal_gamma=0.5)
    with pytest.raises(ValueError, match="unknown reweighting 'inv'"):
        losses.distribution_balanced(y, y, y[0], 2, reweighting="inv")
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        losses.similarity_difference(y, y, reduction="max")


def test_gaussian_divergence_and_similarity(x64):
    rng = np.random.default_rng(5)
    m, v, mt, vt = rng.normal(size=(4, 8, 5))
    expected = 0.5 * (vt - v + np.exp(v - vt) + (m - mt) ** 2 / np.exp(vt) - 1).sum(1)
    divergence = jax.jit(losses.gaussian_kullback_leibler)
    np.testing.assert_allclose(divergence(m, v, mt, vt), expected.mean(), rtol=1e-12)
    few = np.arange(8) < 3
    np.testing.assert_allclose(divergence(m, v, mt, vt, few), expected[:3].mean(), rtol=1e-12)

    def similarity(rows):
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return rows @ rows.T

    difference = jax.jit(losses.similarity_difference, static_argnames="reduction")
    for count in (8, 3):
        square = (similarity(m[:count]) - similarity(v[:count])) ** 2
        mask = np.arange(8) < count
        np.testing.assert_allclose(
            difference(m, v, mask, reduction="sum"), square.sum(), rtol=1e-12
        )
        np.testing.assert_allclose(difference(m, v, mask), square.mean(), rtol=1e-12)
    gradient = jax.jit(jax.grad(difference))(np.zeros((3, 2)), np.ones((3, 2)))
    assert np.isfinite(gradient).all()


def test_cross_entropy(x64):
    y, z = distributions(20, 4, 6), np.random.default_rng(7).normal(0, 3, (20, 4))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    np.testing.assert_allclose(
        jax.jit(losses.cross_entropy)(z, y), -(y * np.log(p)).sum(1).mean(), rtol=1e-12
    )


def test_bounded_log_variances_never_overflow():
    huge = np.array([[-1e30, -1e4, 0.0, 1e4, 1e30]], np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(v, vt):
        return losses.gaussian_kullback_leibler(
            huge * 0, losses.bounded(v, 8.0), huge * 0 + 1, losses.bounded(vt, 8.0)
        )

    for left in (huge, huge * 0):
        for right in (huge[:, ::-1], huge * 0):
            value, gradients = loss(left, right)
            assert np.isfinite(value)
            assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert not np.isfinite(
        jax.jit(losses.gaussian_kullback_leibler)(huge * 0, huge, huge * 0, huge * 0)
    )  # what the released architecture runs into


def test_all_measures_at_once(x64):
    p, y = distributions(20, 5, 8), distributions(20, 5, 9)
    head = np.array([True, False, True, False, False])
    values = measures.measure(p, y, head=head)
    assert list(values) == [*measures.MEASURES, "euclidean", "euclidean_head", "euclidean_tail"]
    assert set(measures.MEASURES) >= measures.HIGHER_IS_BETTER
    np.testing.assert_allclose(
        values["euclidean_head"], np.linalg.norm((p - y)[:, head], axis=1).mean(), rtol=1e-12
    )
    np.testing.assert_allclose(
        values["euclidean_tail"], np.linalg.norm((p - y)[:, ~head], axis=1).mean(), rtol=1e-12
    )
    perfect = measures.measure(y, y, head=head)
    for name, value in perfect.items():
        assert float(value) == pytest.approx(float(name in measures.HIGHER_IS_BETTER), abs=1e-12)
