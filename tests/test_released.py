"""What is the released form's own: its clipping, its biases, its steered decay."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.conftest import skipped_under_strict_promotion


@pytest.mark.parametrize(("factor", "window"), [(5.0, 5), (1.5, 2), (0.5, 1)])
def test_clipping_follows_the_queue(factor, window, x64):
    random = np.random.default_rng(0)
    updates = random.lognormal(sigma=2, size=(30, 1)) * random.normal(size=(30, 6)) / 5
    queue, expected = collections.deque([np.inf], maxlen=window), []
    for update in updates:
        norm, largest = np.linalg.norm(update), max(queue)
        expected.append(update * min(1, factor * largest / (norm + 1e-6)))
        queue.append(min(norm, 2 * largest, 1))
    assert 3 <= np.sum(np.any(np.array(expected) != updates, axis=1)) < 30

    clip = gdmam.clip_by_recent_norm(factor, window)
    _, found = jax.lax.scan(
        lambda state, update: clip.update({"a": update[:2], "b": update[2:]}, state)[::-1],
        clip.init({"a": jnp.zeros(2), "b": jnp.zeros(4)}),
        jnp.asarray(updates),
    )
    np.testing.assert_allclose(np.hstack([found["a"], found["b"]]), expected, rtol=1e-12)


def test_biases_are_told_by_the_last_name_on_their_path():
    names = {"kernel": False, "bias": True, "query_bias": True, "debiased": True, "scale": False}
    params = {"bias_layer": {name: jnp.ones(2) for name in names}}
    optimizer = gdmam.gdmam_released(1.0, weight_decay=0.25, bias_weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(
        gdmam.pair_gradients(zeros, zeros), optimizer.init(params), params
    )
    found = {name: float(update[0]) for name, update in updates["bias_layer"].items()}
    assert found == {name: -0.5 if bias else -0.25 for name, bias in names.items()}


@skipped_under_strict_promotion("a schedule of Optax")
def test_the_learning_rate_can_be_scheduled():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.5})
    params, pair = jnp.ones(2), gdmam.GradientPair(jnp.ones(2), jnp.ones(2))
    results = []
    for rate in (1.0, schedule):
        optimizer = gdmam.gdmam_released(rate)
        state = optimizer.init(params)
        for _ in range(2):
            update, state = optimizer.update(pair, state, params)
        results.append(update)
    np.testing.assert_allclose(results[1], 0.5 * results[0], rtol=1e-6)


def test_the_first_step_in_float32_is_as_long_as_the_rate():
    params, pair = jnp.zeros(2), gdmam.GradientPair(jnp.ones(2), jnp.ones(2))
    optimizer = gdmam.gdmam_released(1e-3, weight_decay=0.0)
    update, _ = optimizer.update(pair, optimizer.init(params), params)
    np.testing.assert_allclose(update, np.full(2, -1e-3), rtol=1e-6)


def test_the_decay_is_steered_by_weights_and_gate():
    """Equal, orthogonal gradients: half the prediction momentum and all of the orthogonal one."""
    optimizer = gdmam.gdmam_released(maximum_momentum=0.999, minimum_momentum=0.1)
    params = jnp.zeros(2)
    pair = gdmam.GradientPair(jnp.array([20.0, 0.0]), jnp.array([0.0, 20.0]))
    _, state = optimizer.update(pair, optimizer.init(params), params)
    seen = gdmam.diagnostics(state)
    expected = 0.5 * seen["prediction_momentum"] + seen["orthogonal_momentum"]
    np.testing.assert_allclose(seen["decay"], expected, rtol=1e-6)
    assert 0.1 < float(seen["decay"]) < 0.999
    # sigma = sqrt(0.1 n^2 - (0.1 n)^2) = 0.3 n
    np.testing.assert_allclose(seen["prediction_momentum"], 0.95 - 0.05 * 6, rtol=1e-5)
    np.testing.assert_allclose(seen["orthogonal_momentum"], 0.95 - 0.1 * 6, rtol=1e-5)


def test_a_norm_that_is_no_number_does_not_switch_clipping_off():
    clip = gdmam.clip_by_recent_norm(factor=2.0, window=2)
    state = clip.init(jnp.zeros(1))
    for size in (0.5, 0.5, jnp.nan, jnp.inf):
        _, state = clip.update(jnp.array([size]), state)
    update, _ = clip.update(jnp.array([1e6]), state)
    np.testing.assert_allclose(update, [1.0], rtol=1e-5)


def test_the_clipping_window_is_as_long_as_asked():
    state = gdmam.gdmam_released(clip_window=3).init(jnp.zeros(2))
    assert state[0].clipping.norms.shape == (3,)


@pytest.mark.parametrize("make", [gdmam.scale_by_gdmam, gdmam.gdmam_released])
def test_without_parameters_nothing_is_done(make):
    optimizer = make()
    state = optimizer.init({})
    updates, after = optimizer.update({}, state, {})
    assert updates == {}
    for found, expected in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(found, expected)
