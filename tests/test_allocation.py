"""Gates, momentum rules, and what a step makes of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import gdmam_jax as gdmam
from gdmam_jax import NormStatistics

RULES = {
    gdmam.ratcheted_momentum: (0.05, 0.1, 0.1),
    gdmam.anchored_momentum: (0.05, 0.1, 0.1),
    gdmam.relative_momentum: (0.25, 0.25, 0.25),
}
"""The momentum rules that follow the norms, with their own sensitivities."""
RAW = {"weighting": gdmam.constant_weighting(1, 1), "gate": gdmam.open_gate}
"""Choices with which the allocated components are the raw ones."""


def run(norms, momentum, dtype=jnp.float32):
    """Statistics and momenta of a run whose prediction and alignment norm at each step are given.

    The two gradients are orthogonal, so the third component's norm is the alignment gradient's.
    """
    optimizer = gdmam.scale_by_gdmam(momentum=momentum, **RAW)

    def step(state, norm):
        pair = gdmam.GradientPair(
            norm * jnp.eye(1, 2, dtype=dtype)[0], norm * jnp.eye(1, 2, 1, dtype=dtype)[0]
        )
        _, state = optimizer.update(pair, state)
        return state, state.statistics

    return jax.lax.scan(step, optimizer.init(jnp.zeros(2, dtype)), jnp.asarray(norms, dtype))[1]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (gdmam.cosine_gate, {-1: (0, 1), -0.5: (0, 1), 0: (0, 1), 0.25: (0.25, 0.75), 1: (1, 0)}),
        (gdmam.conflict_gate, {-1: (0, 1), -0.5: (0, 1), 0: (0, 1), 0.25: (1, 1), 1: (1, 1)}),
        (gdmam.priority_gate, {-1: (0.5, 1), -0.5: (0, 1), 0: (1, 1), 0.25: (1, 1), 1: (1, 1)}),
        (gdmam.open_gate, {-1: (1, 1), 0: (1, 1), 1: (1, 1)}),
    ],
)
def test_gates_at_known_angles(gate, expected):
    for cosine, factors in expected.items():
        found = tuple(float(factor) for factor in gate(jnp.float32(cosine), jnp.float32(2)))
        assert found == factors


def two_gradients(angle, ratio):
    """Unit prediction gradient, and an alignment gradient of that angle and length."""
    return np.array([1.0, 0.0]), ratio * np.array([np.cos(angle), np.sin(angle)])


@jax.jit
def first_update(pair, preference):
    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.unit_weighting(preference=preference),
        momentum=gdmam.constant_momentum(initial=0.0),
    )
    update, state = optimizer.update(pair, optimizer.init(jnp.zeros_like(pair.prediction)))
    return update, gdmam.diagnostics(state)


@settings(max_examples=100)
@given(
    st.floats(0, np.pi), st.floats(-3, 3), st.floats(-2, 2), st.sampled_from(["float32", "float64"])
)
def test_the_priority_gate_is_against_neither_loss(angle, exponent, preference, dtype):
    """To first order, over angles, scales and preferences, wherever the prediction allows it."""
    with jax.enable_x64(True):
        g_p, g_a = two_gradients(angle, 10.0**exponent)
        pair = gdmam.GradientPair(jnp.asarray(g_p, dtype), jnp.asarray(g_a, dtype))
        update, seen = first_update(pair, 10.0**preference)
        update = np.float64(update)
    size = np.linalg.norm(update) + 10.0**preference
    rounding = 8 * float(jnp.finfo(dtype).eps) * size
    assert update @ g_p >= -rounding
    outvoted = -np.cos(angle) > 10.0**preference
    if not outvoted:
        assert update @ (g_a / 10.0**exponent) >= -rounding
    # Nothing more is dropped than that asks for.
    if 1e-3 < float(seen["gate"]) < 0.999:
        np.testing.assert_allclose(update @ (g_a / 10.0**exponent), 0, atol=2 * rounding)
    if outvoted or np.cos(angle) > 0:
        assert float(seen["gate"]) > 1 - 1e-5


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-2, 2)), min_size=2, max_size=5))
@example([(-0.9, 0.0), (-0.9, 0.0), (-0.5, 1.0)])
def test_several_losses_through_the_priority_gate_are_not_against_the_prediction(losses):
    """Together; and each is gated as if alone where they are not longer than what is for it."""
    cosine, exponent = np.array(losses).T
    ratio = 10**exponent
    gate = jax.jit(gdmam.priority_gate)
    with jax.enable_x64(True):
        kept, across = map(np.asarray, gate(cosine, ratio))
        alone = np.array([gate(*pair)[0] for pair in zip(cosine, ratio, strict=True)])
    assert 1 + np.sum(kept * ratio * cosine) >= -1e-9
    assert np.all(across == 1)
    assert np.all(kept <= alone + 1e-12)
    if 1 + np.sum(alone * ratio * cosine) >= 0:
        np.testing.assert_allclose(kept, alone, rtol=1e-12)


def test_a_task_that_does_not_count_passes_the_priority_gate_whole():
    assert float(gdmam.priority_gate(jnp.array(-0.5), jnp.array(0.0))[0]) == 1


def test_the_priority_gate_has_derivatives_next_to_a_right_angle():
    slopes = jax.vmap(jax.grad(lambda cosine: gdmam.priority_gate(cosine, 1.0)[0]))
    cosines = -np.float32([1e-3, 1e-9, 1e-10, 1e-15, 1e-30, 0])
    np.testing.assert_array_equal(slopes(cosines), np.zeros(6))


@pytest.mark.parametrize(("cosine", "one_sided"), [(-0.5, False), (-0.9, True)])
def test_the_conflict_gate_is_one_sided_where_the_priority_gate_is_not(cosine, one_sided):
    g_p, g_a = two_gradients(np.arccos(cosine), 1.0)
    parallel = cosine * g_p
    update = g_p + g_a - parallel
    assert (update @ g_a < 0) == one_sided
    kept = float(gdmam.priority_gate(jnp.float32(cosine), jnp.float32(1))[0])
    assert (update + kept * parallel) @ g_a >= -1e-6


def test_statistics_are_the_recursion_of_the_released_code(x64):
    norms = np.random.default_rng(0).lognormal(size=30)
    statistics = run(norms, gdmam.anchored_momentum, jnp.float64)
    deviation, statistics = np.asarray(statistics.deviation), jax.device_get(statistics)
    mean = square = 0.0
    for step, norm in enumerate(norms):
        mean, square = 0.9 * mean + 0.1 * norm, 0.9 * square + 0.1 * norm**2
        row = jax.tree.map(lambda leaf, step=step: leaf[step], statistics)
        np.testing.assert_allclose(deviation[step, [0, 2]], np.sqrt(square - mean**2), rtol=1e-12)
        np.testing.assert_allclose(row.mean[0] * (1 - row.remainder[0]), mean, rtol=1e-13)


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
        np.testing.assert_allclose(momentum, momenta[0], rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_kept_within_its_bounds(rule):
    for norms in ([0, 1e17, 0, 1e18, 1e-8], [1e18] * 5, [0] * 3):
        momentum = run(norms, rule).momentum
        assert np.all((momentum >= np.float32(0.7)) & (momentum <= np.float32(0.999)))


@pytest.mark.parametrize("rule", RULES)
def test_sensitivities_replace_the_rules_own_one_by_one(rule):
    statistics = NormStatistics(
        momentum=jnp.full(3, 0.9),
        mean=jnp.full(3, 1.0),
        variance=jnp.full(3, 0.04),
        remainder=jnp.zeros(3),
    )
    own = RULES[rule]
    default = rule(initial=0.9)(statistics)
    np.testing.assert_allclose(default, 0.9 - 0.2 * np.array(own), rtol=1e-6)
    settings = (own[0], 0.5, own[2])
    by_name = dict(zip(("prediction", "parallel", "orthogonal"), settings, strict=True))
    for sensitivity in (settings, by_name):
        changed = rule(initial=0.9, sensitivity=sensitivity)(statistics)
        np.testing.assert_allclose(changed[1], 0.9 - 0.5 * 0.2, rtol=1e-6)
        np.testing.assert_array_equal(changed[::2], default[::2])
    calm = dataclasses.replace(statistics, variance=jnp.zeros(3))
    np.testing.assert_allclose(rule(initial=0.9, sensitivity=0.5)(calm), 0.9, rtol=1e-6)


def test_a_constant_momentum_is_the_initial_one_whatever_the_lower_bound():
    pair = gdmam.GradientPair(np.array([3.0, 1.0]), np.array([-1.0, 5.0]))
    for initial in (0.0, 0.5, 0.95, 0.999):
        optimizer = gdmam.scale_by_gdmam(momentum=gdmam.constant_momentum(initial=initial))
        state, update = optimizer.init(jnp.zeros(2)), jax.jit(optimizer.update)
        for _ in range(3):
            _, state = update(pair, state)
        seen = gdmam.diagnostics(state)
        for part in ("prediction", "parallel", "orthogonal"):
            assert float(seen[f"{part}_momentum"]) == pytest.approx(initial)


def test_steered_momentum_is_the_components_mean_by_norm(x64):
    """Against the formula, with decays that differ between components."""
    g_p, g_a = np.array([[2.0, 0.0], [1.0, -1.0]]), np.array([[-1.0, 3.0], [0.5, 2.0]])
    decays = jnp.array([0.9, 0.5, 0.2])
    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.constant_weighting(0.7, 0.4),
        gate=lambda cosine, ratio: (0.5, 2.0),
        momentum=lambda statistics: decays,
    )
    state, m, product = optimizer.init(jnp.zeros(2)), np.zeros(2), 1.0
    compiled = jax.jit(optimizer.update)
    for p, a in zip(g_p, g_a, strict=True):
        update, state = compiled(gdmam.GradientPair(p, a), state)
        parallel = (a @ p) / (p @ p) * p
        parts = [0.7 * p, 0.4 * 0.5 * parallel, 0.4 * 2.0 * (a - parallel)]
        sizes = [np.linalg.norm(part) for part in parts]
        beta = float(np.dot(sizes, decays) / np.sum(sizes))
        product *= beta
        m = beta * m + (1 - beta) * sum(parts)
        np.testing.assert_allclose(update, m / (1 - product), rtol=1e-10)


def test_with_one_decay_steered_and_separate_momenta_agree(x64):
    random = np.random.default_rng(3)
    optimizers = [
        gdmam.scale_by_gdmam(momenta=momenta, b2=0.9) for momenta in ("steered", "separate")
    ]
    states = [optimizer.init(jnp.zeros(5)) for optimizer in optimizers]
    for _ in range(6):
        pair = gdmam.GradientPair(*random.normal(size=(2, 5)))
        updates = []
        for number, optimizer in enumerate(optimizers):
            update, states[number] = jax.jit(optimizer.update)(pair, states[number])
            updates.append(update)
        np.testing.assert_allclose(*updates, rtol=1e-12)
    assert [len(state.momenta) for state in states] == [1, 3]


def test_norm_means_are_bias_corrected_running_means(x64):
    optimizer = gdmam.scale_by_gdmam(statistics_decay=0.8)
    state, numerator, denominator = optimizer.init(jnp.zeros(2)), np.zeros(2), 0.0
    update = jax.jit(optimizer.update)
    for scale in (1.0, 5.0, 0.1, 2.0):
        pair = gdmam.GradientPair(np.array([scale, 0.0]), np.array([0.0, 3 * scale**2]))
        _, state = update(pair, state)
        numerator = 0.8 * numerator + [scale, 3 * scale**2]
        denominator = 0.8 * denominator + 1
        np.testing.assert_allclose(state.allocation.norms, numerator / denominator, rtol=1e-12)


CHOICES = {
    "arrays": {
        "weighting": lambda gramian, norms: jnp.ones_like(norms).at[..., 1].set(2),
        "gate": lambda cosine, ratio: (0 * cosine, 0 * ratio + 3),
        "momentum": lambda statistics: 0.0 * statistics.mean,
    },
    "numbers": {
        "weighting": lambda gramian, norms: (1.0, 2),
        "gate": lambda cosine, ratio: (0.0, 3.0),
        "momentum": lambda statistics: 0.0,
    },
    "mixed": {
        "weighting": lambda gramian, norms: [1.0, 2 * jnp.ones_like(norms[..., 1])],
        "gate": lambda cosine, ratio: [0.0, 3.0 * jnp.ones_like(ratio)],
        "momentum": lambda statistics: jnp.zeros(3),
    },
}


@pytest.mark.parametrize("scope", [None, gdmam.leaf_scope])
@pytest.mark.parametrize("choices", CHOICES)
def test_users_can_bring_choices_of_their_own(choices, scope):
    optimizer = gdmam.scale_by_gdmam(**CHOICES[choices], scope=scope)
    pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([5.0, 1.0]))
    update, _ = jax.jit(optimizer.update)(pair, optimizer.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, [1, 6])


@pytest.mark.parametrize(
    ("choice", "function", "message"),
    [
        ("weighting", lambda gramian, norms: (1.0,), r"weighting must return 2 weights.*1 values"),
        ("weighting", lambda gramian, norms: jnp.ones(3), r"weighting must .*shape \(3,\)"),
        ("weighting", lambda gramian, norms: gramian, r"weighting must .*shape \(2, 2\)"),
        ("gate", lambda cosine, ratio: (1.0, 1.0, 1.0), r"gate must return 2 factors.*3 values"),
        ("gate", lambda cosine, ratio: cosine, r"gate must return 2 factors.*shape \(1,\)"),
        ("gate", lambda cosine, ratio: (jnp.ones(5), 1.0), r"gate must return 2 factors.*\[5\]"),
        (
            "momentum",
            lambda statistics: jnp.ones(2),
            r"momentum must return 3 coefficients.*shape \(2,\)",
        ),
    ],
)
def test_choices_that_return_something_else_are_refused_while_tracing(choice, function, message):
    optimizer = gdmam.scale_by_gdmam(**{choice: function})
    pair = gdmam.GradientPair(jnp.ones(2), jnp.ones(2))
    state = jax.eval_shape(optimizer.init, jnp.zeros(2))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.update, pair, state)
