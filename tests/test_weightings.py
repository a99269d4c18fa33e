"""Weightings as functions of the Gramian and the norms' running means."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdmam_jax as gdmam

EVERY = {
    "norm": gdmam.norm_weighting,
    "balanced": gdmam.balanced_weighting,
    "unit": gdmam.unit_weighting,
    "pcgrad": gdmam.pcgrad_weighting,
    "config": gdmam.config_weighting,
    "constant": gdmam.constant_weighting(1.0, 0.5),
}


def gramian_of(gradients):
    return gradients @ np.swapaxes(gradients, -1, -2)


def test_balanced_weights_give_all_weighted_gradients_one_norm(x64):
    g = np.random.default_rng(0).normal(size=(4, 6)) * np.array([[1.0], [10], [0.1], [3]])
    w = np.asarray(jax.jit(gdmam.balanced_weighting)(gramian_of(g), None))
    sizes = w * np.linalg.norm(g, axis=1)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-12)
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)


def test_norm_weights_are_shares_of_the_norms(x64):
    g = np.random.default_rng(1).normal(size=(3, 6))
    n = np.linalg.norm(g, axis=1)
    w = jax.jit(gdmam.norm_weighting)(gramian_of(g), None)
    np.testing.assert_allclose(w, n / n.sum(), rtol=1e-10)


def test_unit_weights_take_the_mean_and_a_spike_counts_no_more_than_the_rest():
    means, weighting = np.array([4.0, 2.0]), jax.jit(gdmam.unit_weighting)
    for norm, expected in ((1.0, 0.25), (4.0, 0.25), (1e6, 1e-6)):
        weights = weighting(np.diag([norm**2, 1.0]), means)
        np.testing.assert_allclose(weights, [expected, 0.5], rtol=1e-6)


def test_preferences_are_one_for_each_alignment_task():
    gramian, means = np.eye(3), np.array([1.0, 2.0, 4.0])
    found = jax.jit(gdmam.unit_weighting(preference=(0.5, 3.0)))(gramian, means)
    np.testing.assert_allclose(found, [1, 0.25, 0.75])
    np.testing.assert_allclose(jax.jit(gdmam.unit_weighting())(gramian, means), [1, 0.5, 0.25])


PREFERRING = (
    gdmam.unit_weighting,
    gdmam.config_weighting,
    gdmam.aligned_mtl_weighting,
    gdmam.upgrad_weighting,
    gdmam.dual_proj_weighting,
)


def _preferred(weighting, gramian, means, preference):
    return weighting(gramian, means, preference=preference)


@pytest.mark.parametrize("weighting", PREFERRING)
def test_a_preference_is_of_the_alignment_losses_and_1_changes_nothing(weighting, x64):
    for count in (2, 3):
        gramian = gramian_of(np.random.default_rng(count).normal(size=(count, 6)))
        means = np.ones(count)
        preferred = jax.jit(functools.partial(_preferred, weighting))
        even = preferred(gramian, means, np.ones(count - 1))
        np.testing.assert_allclose(even, jax.jit(weighting)(gramian, means), rtol=1e-9)
        # Orthogonal gradients, as long as each other, are weighed as wanted.
        for wanted in (0.3, 3.0):
            w = np.asarray(preferred(np.eye(count), means, np.full(count - 1, wanted)))
            np.testing.assert_allclose(w[1:] / w[0], wanted, rtol=1e-7)
        with pytest.raises(ValueError, match=f"preference must be a number or {count - 1} of them"):
            weighting(gramian, means, preference=(1.0,) * count)
        with pytest.raises(ValueError, match="preference"):
            weighting(gramian, means, preference=-1.0)


@pytest.mark.parametrize(
    ("weighting", "setting", "shape"),
    [
        (gdmam.unit_weighting, "preference", ()),
        (gdmam.unit_weighting, "preference", (1,)),
        (gdmam.cagrad_weighting, "c", ()),
        (gdmam.fairgrad_weighting, "alpha", ()),
    ],
)
def test_a_setting_may_be_an_array_of_jax(weighting, setting, shape):
    """Also while a step is traced, where comparing it would be traced, too."""
    settings = jnp.full(shape, 0.7), 0.7
    weights = jax.jit(lambda *given: [weighting(**{setting: each})(*given) for each in settings])
    given = np.float32([[4, 0], [0, 1]]), np.ones(2, np.float32)
    np.testing.assert_allclose(*weights(*given), rtol=1e-6)


def test_an_array_of_jax_that_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="preference must lie in"):
        gdmam.unit_weighting(preference=jnp.array([-1.0]))


def test_arrays_may_be_given_by_name():
    weights = jax.jit(lambda g, n: gdmam.unit_weighting(gramian=g, norms=n, preference=0.5))
    np.testing.assert_allclose(weights(np.diag([4.0, 1.0]), np.ones(2)), [0.5, 0.5])


@pytest.mark.parametrize("weighting", [gdmam.dual_proj_weighting, gdmam.upgrad_weighting])
@pytest.mark.parametrize("preference", [0.0, 0.3, 1.0, 4.0])
def test_the_closed_form_for_two_is_the_solvers(weighting, preference, x64):
    """The solver is called for three, of which the third is absent."""
    random = np.random.default_rng(0)
    gradients = random.normal(size=(60, 2, 3)) * 10 ** random.uniform(-2, 2, size=(60, 2, 1))
    chosen, gramians = weighting(preference=preference), gramian_of(gradients)

    @jax.jit
    @jax.vmap
    def both(gramian):
        three = jnp.zeros((3, 3)).at[:2, :2].set(gramian)
        present = np.array([True, True, False])
        return chosen(gramian, None), chosen(three, None, present=present)[:2]

    found, expected = both(gramians)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert 10 < np.sum(gramians[:, 0, 1] < 0) < 50


@pytest.mark.parametrize("weighting", [gdmam.mgda_weighting, gdmam.cagrad_weighting])
@pytest.mark.parametrize("count", [2, 3])
def test_beside_an_absent_loss_long_gradients_count_as_short_ones(weighting, count):
    present = np.arange(count) < count - 1
    gramian = np.diag(np.where(present, np.arange(1.0, 1 + count), 0)).astype(np.float32)
    weights = jax.jit(lambda gramian: weighting(gramian, None, present=present))
    np.testing.assert_allclose(weights(1e30 * gramian), weights(gramian), rtol=1e-5)


def test_a_choice_with_settings_can_be_sent_to_another_process():
    chosen = gdmam.unit_weighting(preference=2.0)
    there = pickle.loads(pickle.dumps(chosen))
    gramian, norms = jnp.diag(jnp.array([9.0, 1.0])), jnp.array([4.0, 0.5])
    np.testing.assert_array_equal(there(gramian, norms), chosen(gramian, norms))


def test_pcgrads_key_draws_the_order_and_of_two_there_is_one():
    gramian = np.float32([[1.0, -1.0], [-1.0, 2.0]])
    keyed = gdmam.pcgrad_weighting(key=jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(keyed)(gramian, None), [2, 1.5])
    three = np.float32([[1.0, -0.5, -0.8], [-0.5, 1.0, 0.3], [-0.8, 0.3, 1.0]])
    weighting, keys = jax.jit(gdmam.pcgrad_weighting), [jax.random.key(k) for k in range(6)]
    drawn = [np.asarray(weighting(three, None, key=key)) for key in keys]
    assert max(np.abs(drawn[0] - each).max() for each in drawn) > 0.1
    seeded = gdmam.pcgrad_weighting(key=0)
    for _ in range(2):  # the same at every step
        np.testing.assert_array_equal(drawn[0], jax.jit(seeded)(three, None))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("preferred", [False, True])
def test_config_has_the_wanted_projections_and_its_length(count, preferred, x64):
    random = np.random.default_rng(count)
    g = random.normal(size=(count, 8)) * 10.0 ** random.uniform(-2, 2, size=(count, 1))
    wanted = random.uniform(0.5, 2, size=count) if preferred else np.ones(count)
    weighting = jax.jit(gdmam.config_weighting)
    w = weighting(gramian_of(g), None, preference=wanted[1:] / wanted[0])
    direction = np.asarray(w) @ g
    units = g / np.linalg.norm(g, axis=1, keepdims=True)
    projections = units @ direction
    np.testing.assert_allclose(projections / projections[0], wanted / wanted[0], rtol=1e-7)
    along = direction / np.linalg.norm(direction)
    np.testing.assert_allclose(np.linalg.norm(direction), np.sum(g @ along), rtol=1e-7)


def test_config_of_two_in_closed_form_is_the_general_one(x64):
    g = np.random.default_rng(3).normal(size=(2, 5))
    weighting = jax.jit(gdmam.config_weighting)
    closed = weighting(gramian_of(g), None)
    general = weighting(gramian_of(g), None, preference=np.ones(1))
    np.testing.assert_allclose(closed, general, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_scopes_are_weighed_one_by_one(name, x64):
    g = np.random.default_rng(4).normal(size=(5, 2, 6))
    gramian, means = gramian_of(g), np.random.default_rng(5).uniform(size=(5, 2))
    weighting = jax.jit(EVERY[name])
    together = np.asarray(weighting(gramian, means))
    assert together.shape == (5, 2)
    for row in range(5):
        np.testing.assert_allclose(together[row], weighting(gramian[row], means[row]), rtol=1e-12)


DEGENERATE = {
    "both zero": np.zeros((2, 3)),
    "no prediction": np.array([[0.0, 0, 0], [1, 2, 3]]),
    "no alignment": np.array([[1.0, 2, 3], [0, 0, 0]]),
    "parallel": np.array([[1.0, 2, 3], [2, 4, 6]]),
    "opposed": np.array([[1.0, 2, 3], [-1, -2, -3]]),
    "far apart": np.array([[1e-9, 0, 0], [1e9, 1, 0]]),
}


@pytest.mark.parametrize("name", EVERY)
def test_weights_and_derivatives_are_finite(name):
    def total(g):
        gramian = g @ g.T
        means = jnp.sqrt(jnp.diagonal(jax.lax.stop_gradient(gramian)))
        return jnp.sum(EVERY[name](gramian, means)), EVERY[name](gramian, means)

    slopes = jax.jit(jax.value_and_grad(total, has_aux=True))
    for case, g in DEGENERATE.items():
        (_, weights), slope = slopes(np.float32(g))
        assert np.isfinite(weights).all(), case
        assert np.isfinite(slope).all(), case
        assert (weights >= 0).all(), case


@pytest.mark.parametrize("name", ["balanced", "unit", "config"])
def test_a_task_without_gradient_leaves_the_other_its_weight(name):
    g = np.float32([[0.0, 0, 0], [0, 3, 4]])
    weights = jax.jit(EVERY[name])(gramian_of(g), np.array([0.0, 5.0]))
    expected = {"balanced": 1, "unit": 0.2, "config": 1}[name]
    np.testing.assert_allclose(weights, [0, expected], rtol=1e-6)


@pytest.mark.parametrize("norm", [1e-12, 1.0, 1e18])
@pytest.mark.parametrize("weighting", [gdmam.norm_weighting, gdmam.balanced_weighting])
def test_shares_add_up_to_one_at_every_scale(norm, weighting):
    for other in (1e-12, 1.0, norm):
        weights = jax.device_get(jax.jit(weighting)(np.diag([norm**2, other**2]), None))
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
        assert ((weights >= 0) & (weights <= 1)).all()


SEVERAL = {
    "pcgrad": gdmam.pcgrad_weighting,
    "imtl_g": gdmam.imtl_g_weighting,
    "mgda": gdmam.mgda_weighting,
    "cagrad": gdmam.cagrad_weighting,
    "nash_mtl": gdmam.nash_mtl_weighting,
    "aligned_mtl": gdmam.aligned_mtl_weighting,
    "dual_proj": gdmam.dual_proj_weighting,
    "upgrad": gdmam.upgrad_weighting,
    "config": gdmam.config_weighting,
    "fairgrad": gdmam.fairgrad_weighting,
}
A, B = [1.0, 2, 3, 0], [0.0, 1, -1, 1]
DEGENERATE_OF_THREE = {
    "all zero": np.zeros((3, 4)),
    "one zero": np.array([np.zeros(4), A, B]),
    "two zero": np.array([np.zeros(4), np.zeros(4), B]),
    "parallel": np.array([A, np.multiply(2, A), B]),
    "equal": np.ones((3, 4)),
    "opposed": np.array([A, np.negative(A), B]),
    "in one line": np.array([A, np.negative(A), np.negative(A)]),
    "orthogonal": np.eye(3, 4),
    "far apart": np.array([[1e-9, 0, 0, 0], [1e9, 1, 0, 0], [0, 1, 0, 1]]),
    "tiny": 1e-10 * (np.eye(3, 4) - np.eye(3, 4, 1)),
}


@functools.cache
def compiled_weights(name):
    return jax.jit(lambda gramian: SEVERAL[name](gramian, None))


@functools.cache
def compiled(name):
    """Weights, and the derivative of a combination of them."""

    def combination(g):
        weights = SEVERAL[name](g @ g.T, None)
        return weights @ jnp.arange(1, 1 + weights.size, dtype=weights.dtype), weights

    return jax.jit(jax.value_and_grad(combination, has_aux=True))


@pytest.mark.parametrize("name", EVERY | SEVERAL)
def test_strict_promotion_of_ranks_and_dtypes(name):
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        for count in (2, 3) if name in SEVERAL else (2,):
            jax.eval_shape(
                (EVERY | SEVERAL)[name], np.zeros((4, count, count)), np.ones((4, count))
            )


@pytest.mark.parametrize("name", SEVERAL)
def test_weights_and_derivatives_of_three_are_finite(name):
    for case, g in DEGENERATE_OF_THREE.items():
        (_, weights), slope = compiled(name)(np.float32(g))
        assert np.isfinite(weights).all(), case
        assert np.isfinite(slope).all(), case


@pytest.mark.parametrize("name", SEVERAL)
def test_derivatives_are_those_of_finite_differences(name, x64):
    random = np.random.default_rng(5)
    g = random.normal(size=(3, 10))
    g, change = g - 1.2 * g.mean(axis=0), random.normal(size=g.shape)
    _, slope = compiled(name)(g)
    after, before = (compiled(name)(g + side * change)[0][0] for side in (1e-5, -1e-5))
    np.testing.assert_allclose(np.sum(slope * change), (after - before) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("name", SEVERAL)
def test_float32_agrees_with_float64(name, count):
    """The direction, however far apart the norms: but Aligned-MTL's eigenvalues then round."""
    random = np.random.default_rng(count)
    tolerance = 1e-3 if name in ("nash_mtl", "fairgrad") else 1e-4
    for apart in (0, 3) if name != "aligned_mtl" else (0,):
        for conflict in (0, 0.9):
            rows = random.normal(size=(count, 10))
            rows = rows - conflict * rows.mean(axis=0)
            rows = rows * 10 ** random.uniform(-apart, apart, size=(count, 1))
            gramian = (rows @ rows.T).astype(np.float32)
            found = np.asarray(compiled_weights(name)(gramian), np.float64)
            with jax.enable_x64(True):
                exact = np.asarray(compiled_weights(name)(rows @ rows.T))
            difference = np.linalg.norm((found - exact) @ rows)
            assert difference < tolerance * np.linalg.norm(exact @ rows)


@pytest.mark.parametrize("seed", [14, 42])  # each failed with one of XLA's levels of optimisation
def test_a_solver_stops_before_float32_underflows(seed):
    rows = np.random.default_rng(seed).normal(size=(3, 10))
    rows = rows - 1.2 * rows.mean(axis=0)
    found = compiled_weights("upgrad")((rows @ rows.T).astype(np.float32))
    with jax.enable_x64(True):
        exact = compiled_weights("upgrad")(rows @ rows.T)
    np.testing.assert_allclose(found, np.asarray(exact), rtol=1e-4)


def many_gradients(kind, count=20):
    random = np.random.default_rng(0)
    rows = random.normal(size=(count, 2 * count))
    if kind == "conflicting":
        rows += 30 * (-1.0) ** np.arange(count)[:, None] * random.normal(size=2 * count)
    if kind == "nearly dependent":
        rows = random.normal(size=(count, 3)) @ random.normal(size=(3, 2 * count)) + 1e-5 * rows
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_twenty_steps_are_enough_however_gradients_conflict(monkeypatch, x64):
    """The conditions of the projection, which is in closed form nowhere."""
    monkeypatch.setattr("gdmam_jax._programmes.ITERATIONS", 20)
    weighting = jax.jit(lambda gramian: gdmam.dual_proj_weighting(gramian, None))
    for kind in ("random", "conflicting", "nearly dependent"):
        gramian = gramian_of(many_gradients(kind))
        weights = np.asarray(weighting(gramian))
        added, gains = weights - 1 / weights.size, gramian @ weights
        assert added.min() >= 0, kind
        assert gains.min() > -1e-12, kind
        np.testing.assert_allclose(added @ gains, 0, atol=1e-12, err_msg=kind)


@pytest.mark.parametrize("name", SEVERAL)
def test_weights_keep_float32_where_float64_is_on(name, x64):
    weights = np.asarray(compiled_weights(name)(np.eye(3, dtype=np.float32)))
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights / weights[0], 1, rtol=1e-5)
