"""The step's scalars, wherever the optimizer state keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

PARAMS = {"encoder": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(2)}}
PAIRS = gdmam.pair_gradients(
    {"encoder": {"w": jnp.array([1.0, 2.0, 0.0])}, "head": {"w": jnp.array([0.0, 1.0])}},
    {"encoder": {"w": jnp.array([0.5, -1.0, 2.0])}, "head": {"w": jnp.array([3.0, 1.0])}},
)
KEYS = {
    *("cosine", "projection", "gate", "orthogonal_gate", "prediction_weight", "alignment_weight"),
    *(f"{part}_momentum" for part in ("prediction", "parallel", "orthogonal")),
    *(f"{part}_norm" for part in ("prediction", "alignment", "parallel", "orthogonal")),
}


def one_step(optimizer, pairs=PAIRS):
    return jax.jit(optimizer.update)(pairs, optimizer.init(PARAMS), PARAMS)[1]


def test_scalars_are_those_of_the_step():
    """Every key against a value computed here."""
    optimizer = gdmam.gdmam(0.1, momentum=gdmam.relative_momentum)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for _ in range(2):
        _, state = update(PAIRS, state, PARAMS)
    seen = gdmam.diagnostics(state)
    n_p, n_a, product = np.sqrt(6), np.sqrt(0.25 + 1 + 4 + 10), -0.5
    conflict = -product / (n_p * n_a)
    expected = {
        "prediction_norm": n_p,
        "alignment_norm": n_a,
        "cosine": -conflict,
        "projection": product / 6,
        "parallel_norm": -product / n_p,
        "orthogonal_norm": np.sqrt(n_a**2 - product**2 / 6),
        "prediction_weight": 1 / n_p,
        "alignment_weight": 1 / n_a,
        "gate": max(0, (conflict + conflict**2 - 1) / conflict**2),
        "orthogonal_gate": 1,
        "prediction_momentum": 0.95,
        "parallel_momentum": 0.95,
        "orthogonal_momentum": 0.95,
    }
    assert set(seen) == KEYS == set(expected)
    assert all(value.shape == () for value in seen.values())
    for name, value in expected.items():
        np.testing.assert_allclose(seen[name], value, rtol=1e-5, err_msg=name)


def test_momenta_are_reported_one_by_one():
    optimizer = gdmam.scale_by_gdmam(momentum=lambda statistics: jnp.array([0.8, 0.9, 0.7]))
    seen = gdmam.diagnostics(one_step(optimizer))
    found = [seen[f"{part}_momentum"] for part in ("prediction", "parallel", "orthogonal")]
    np.testing.assert_allclose(found, [0.8, 0.9, 0.7], rtol=1e-6)


def test_gates_are_reported_one_by_one():
    optimizer = gdmam.scale_by_gdmam(gate=lambda cosine, ratio: (0.25, 0.5))
    seen = gdmam.diagnostics(one_step(optimizer))
    assert (float(seen["gate"]), float(seen["orthogonal_gate"])) == (0.25, 0.5)


def test_before_the_first_step_all_is_zero_but_the_momenta():
    for name, value in gdmam.diagnostics(gdmam.gdmam(0.1).init(PARAMS)).items():
        assert float(value) == pytest.approx(1 if name.endswith("momentum") else 0)


def test_several_alignment_losses_are_told_apart_by_name():
    prediction, alignment = jax.device_get(gdmam.unpair_gradients(PAIRS))
    pairs = gdmam.pair_gradients(
        prediction, {"near": prediction, "far": jax.tree.map(np.negative, alignment)}
    )
    seen = gdmam.diagnostics(one_step(gdmam.gdmam(0.1, alignment_losses=("near", "far")), pairs))
    np.testing.assert_allclose(seen["cosine/near"], 1, rtol=1e-6)
    np.testing.assert_allclose(seen["cosine/far"], 0.5 / (np.sqrt(6) * np.sqrt(15.25)), rtol=1e-5)
    assert {key.split("/")[0] for key in seen} == KEYS
    pairs = gdmam.pair_gradients(prediction, (alignment, prediction))
    seen = gdmam.diagnostics(one_step(gdmam.gdmam(0.1, alignment_losses=2), pairs))
    np.testing.assert_allclose(seen["cosine/1"], 1, rtol=1e-6)


def test_a_weighed_optimizer_reports_its_weights():
    seen = gdmam.diagnostics(one_step(gdmam.weighed(optax.sgd(0.1), gdmam.pcgrad_weighting)))
    np.testing.assert_allclose(seen["prediction_weight"], 1 + 0.5 / 6, rtol=1e-6)
    np.testing.assert_allclose(seen["alignment_weight"], 1 + 0.5 / 15.25, rtol=1e-6)
    assert not [name for name in seen if "momentum" in name]


def test_a_loss_of_any_name_keeps_its_scalars_under_weighed():
    optimizer = gdmam.weighed(
        optax.sgd(0.1), gdmam.mean_weighting, alignment_losses=("a_momentum", "b")
    )
    gradient = np.ones(2)
    pair = gdmam.GradientPair(gradient, {"a_momentum": gradient, "b": -gradient})
    _, state = jax.jit(optimizer.update)(pair, optimizer.init(gradient), gradient)
    seen = gdmam.diagnostics(state)
    np.testing.assert_allclose(seen["cosine/a_momentum"], 1, rtol=1e-6)
    np.testing.assert_allclose(seen["cosine/b"], -1, rtol=1e-6)
    assert not [name for name in seen if name.startswith("prediction_momentum")]


@pytest.mark.parametrize(
    "nest",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(100.0), tx),
        lambda tx: optax.masked(tx, {"encoder": True, "head": True}),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.sgd(rate)))(
            rate=1.0
        ),
        lambda tx: gdmam.over_pairs(lambda inner: optax.apply_if_finite(inner, 3), tx),
    ],
    ids=["chain", "masked", "injected", "lifted"],
)
def test_found_inside_nested_states(nest):
    plain = gdmam.diagnostics(one_step(gdmam.scale_by_gdmam()))
    nested = gdmam.diagnostics(one_step(nest(gdmam.scale_by_gdmam())))
    assert nested.keys() == plain.keys()
    for name in plain:
        np.testing.assert_allclose(nested[name], plain[name], rtol=1e-6)


def test_released_form_tells_its_decay_too():
    assert set(gdmam.diagnostics(one_step(gdmam.gdmam_released()))) == {*KEYS, "decay"}


def test_scopes_and_several_states_are_told_apart():
    scoped = gdmam.gdmam(0.1, scope=lambda path: path.split("/")[0])
    seen = gdmam.diagnostics(one_step(scoped))
    assert set(seen) == {f"{label}/{key}" for label in PARAMS for key in KEYS}
    np.testing.assert_allclose(seen["head/prediction_norm"], 1, rtol=1e-6)

    two = optax.partition(
        {"a": gdmam.gdmam(0.1), "b": gdmam.gdmam(0.1)}, {"encoder": "a", "head": "b"}
    )
    seen = gdmam.diagnostics(one_step(two))
    assert len(seen) == 2 * len(KEYS)
    norms = sorted(float(value) for key, value in seen.items() if key.endswith("prediction_norm"))
    np.testing.assert_allclose(norms, [1, np.sqrt(5)], rtol=1e-6)


def test_metrics_of_a_compiled_step():
    optimizer = gdmam.gdmam(0.1)

    @jax.jit
    def step(state):
        _, state = optimizer.update(PAIRS, state, PARAMS)
        return gdmam.diagnostics(state)

    _, after = optimizer.update(PAIRS, optimizer.init(PARAMS), PARAMS)
    eager = gdmam.diagnostics(after)
    for name, value in step(optimizer.init(PARAMS)).items():
        np.testing.assert_allclose(value, eager[name], rtol=1e-6)


def test_a_state_without_gdmam_is_refused():
    with pytest.raises(ValueError, match="no GDMAM state found"):
        gdmam.diagnostics(optax.adam(0.1).init(PARAMS))


def test_an_ensemble_has_the_losses_that_each_member_skipped():
    optimizer, w = gdmam.gdmam(0.1, not_finite="skip_loss"), jnp.ones(3)

    @jax.jit
    @jax.vmap
    def member(factor):
        pair = gdmam.GradientPair(w, factor * w)
        return optimizer.update(pair, optimizer.init(w), w)[1]

    for factors in ([np.nan, 1.0], [np.nan, 1.0, np.nan]):
        seen = gdmam.diagnostics(member(np.array(factors)))
        np.testing.assert_array_equal(seen["skipped/alignment"], np.isnan(factors))
        assert not seen["skipped/prediction"].any()
