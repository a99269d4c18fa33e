"""Weights, gates and momentum rules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdmam_jax as gdmam
from gdmam_jax.allocation import NormStatistics

RULES = (gdmam.ratcheted_momentum, gdmam.anchored_momentum, gdmam.relative_momentum)


def run(norms, momentum, dtype=jnp.float32):
    """Statistics and momenta of a run whose prediction and alignment norm at each step are given.

    The two gradients are orthogonal, so the third component's norm is the alignment gradient's.
    """
    optimizer = gdmam.scale_by_gdmam(momentum=momentum)

    def step(state, norm):
        pair = gdmam.GradientPair(
            norm * jnp.eye(1, 2, dtype=dtype)[0], norm * jnp.eye(1, 2, 1, dtype=dtype)[0]
        )
        _, state = optimizer.update(pair, state)
        return state, state.allocation.statistics

    return jax.lax.scan(step, optimizer.init(jnp.zeros(2, dtype)), jnp.asarray(norms, dtype))[1]


def test_balanced_weights_give_both_weighted_gradients_one_norm():
    n_p, n_a = jnp.array(3.0), jnp.array(0.2)
    w_p, w_a = gdmam.balanced_weighting(n_p, n_a)
    np.testing.assert_allclose(w_p * n_p, w_a * n_a, rtol=1e-6)
    np.testing.assert_allclose(sum(gdmam.norm_weighting(n_p, n_a)), 1, rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e18, 4e37])
@pytest.mark.parametrize("weighting", [gdmam.norm_weighting, gdmam.balanced_weighting])
def test_weights_are_finite_and_add_up_to_one_at_every_scale(norm, weighting):
    for other in (1e-12, 1.0, norm):
        weights = weighting(jnp.float32(norm), jnp.float32(other))
        np.testing.assert_allclose(sum(weights), 1, rtol=1e-6)
        assert all(0 <= float(weight) <= 1 for weight in weights)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (gdmam.cosine_gate, {-1: (0, 1), -0.5: (0, 1), 0: (0, 1), 0.25: (0.25, 0.75), 1: (1, 0)}),
        (gdmam.conflict_gate, {-1: (0, 1), -0.5: (0, 1), 0: (0, 1), 0.25: (1, 1), 1: (1, 1)}),
        (gdmam.open_gate, {-1: (1, 1), 0: (1, 1), 1: (1, 1)}),
    ],
)
def test_gates_at_known_angles(gate, expected):
    for cosine, factors in expected.items():
        assert tuple(float(factor) for factor in gate(jnp.float32(cosine))) == factors


def test_statistics_are_the_recursion_of_the_released_code(x64):
    norms = np.random.default_rng(0).lognormal(size=30)
    statistics = run(norms, gdmam.anchored_momentum, jnp.float64)
    mean = square = 0.0
    for step, norm in enumerate(norms + 1e-12):
        mean, square = 0.9 * mean + 0.1 * norm, 0.9 * square + 0.1 * norm**2
        row = jax.tree.map(lambda leaf, step=step: leaf[step], statistics)
        np.testing.assert_allclose(
            row.deviation[jnp.array([0, 2])], np.sqrt(square - mean**2), rtol=1e-12
        )
        np.testing.assert_allclose(row.mean[0] * (1 - row.remainder), mean, rtol=1e-13)


def test_a_norm_that_does_not_vary_has_no_deviation_in_float32():
    """Where a mean square less a squared mean would leave 3e-4 of the norm."""
    statistics = run(np.full(300, 1234.5), gdmam.relative_momentum)
    assert np.max(statistics.variance[:, 0]) < (1e-5 * 1234.5) ** 2
    np.testing.assert_allclose(statistics.momentum[:, 0], 0.95, rtol=1e-5)
    last = jax.tree.map(lambda leaf: leaf[-1], statistics)
    assert float(last.deviation[0]) < 1e-5 * 1234.5


def test_ratcheted_momentum_never_rises_and_anchored_recovers():
    norms = np.concatenate([np.full(20, 1.0), [30.0], np.full(100, 1.0)])
    ratcheted = run(norms, gdmam.ratcheted_momentum).momentum
    assert np.all(np.diff(ratcheted, axis=0) <= 0)
    assert float(ratcheted[-1, 0]) == pytest.approx(0.7)
    anchored = run(norms, gdmam.anchored_momentum).momentum
    assert np.min(anchored[:, 0]) < 0.75
    assert float(anchored[-1, 0]) > 0.93


def test_relative_momentum_does_not_change_when_a_loss_is_rescaled():
    norms = np.random.default_rng(1).lognormal(sigma=0.3, size=20)
    momenta = [run(scale * norms, gdmam.relative_momentum).momentum for scale in (1.0, 1e-3, 1e6)]
    assert np.ptp(momenta[0][:, 0]) > 0.01
    for momentum in momenta[1:]:
        # The parallel part is zero here: its norm is the 1e-12 that does not scale.
        np.testing.assert_allclose(momentum[:, ::2], momenta[0][:, ::2], rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_kept_within_its_bounds(rule):
    for norms in ([0, 1e18, 0, 1e30, 1e-8], [1e30] * 5, [0] * 3):
        momentum = run(norms, rule).momentum
        assert np.all((momentum >= np.float32(0.7)) & (momentum <= np.float32(0.999)))


@pytest.mark.parametrize("rule", RULES)
def test_sensitivities_replace_the_rules_own_one_by_one(rule):
    statistics = NormStatistics(
        momentum=jnp.full(3, 0.9),
        mean=jnp.full(3, 1.0),
        variance=jnp.full(3, 0.04),
        remainder=jnp.array(0.0),
    )
    default = rule(statistics, 0.9, (None, None, None))
    changed = rule(statistics, 0.9, (None, 0.5, None))
    np.testing.assert_allclose(changed[1], 0.9 - 0.5 * 0.2, rtol=1e-6)
    np.testing.assert_array_equal(changed[::2], default[::2])
    calm = dataclasses.replace(statistics, variance=jnp.zeros(3))
    np.testing.assert_allclose(rule(calm, 0.9, (None, 0.5, None)), 0.9, rtol=1e-6)


@pytest.mark.parametrize("scope", [None, gdmam.leaf_scope])
@pytest.mark.parametrize(
    "choices",
    [
        {
            "weighting": lambda n_p, n_a: (jnp.ones_like(n_p), 2 * jnp.ones_like(n_a)),
            "gate": lambda cosine: (0 * cosine, 0 * cosine + 3),
            "momentum": lambda statistics, initial, sensitivity: 0.0 * statistics.mean,
        },
        {
            "weighting": lambda n_p, n_a: (1.0, 2),
            "gate": lambda cosine: (0.0, 3.0),
            "momentum": lambda statistics, initial, sensitivity: 0.0,
        },
        {
            "weighting": lambda n_p, n_a: (1.0, 2 * jnp.ones_like(n_a)),
            "gate": lambda cosine: (0.0, 3.0),
            "momentum": lambda statistics, initial, sensitivity: jnp.zeros(3),
        },
    ],
    ids=["arrays", "numbers", "mixed"],
)
def test_users_can_bring_choices_of_their_own(choices, scope):
    optimizer = gdmam.scale_by_gdmam(**choices, scope=scope, minimum_momentum=0.0)
    pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([5.0, 1.0]))
    update, _ = optimizer.update(pair, optimizer.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, [1, 6])
