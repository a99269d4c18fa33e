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


def one_step(optimizer):
    return optimizer.update(PAIRS, optimizer.init(PARAMS), PARAMS)[1]


def test_scalars_are_those_of_the_step():
    seen = gdmam.diagnostics(one_step(gdmam.gdmam(0.1)))
    assert set(seen) == KEYS
    geometry = gdmam.decompose(PAIRS).geometry
    for name in ("cosine", "projection", "orthogonal_norm", "prediction_weight", "gate"):
        np.testing.assert_allclose(seen[name], getattr(geometry, name), rtol=1e-6)
    assert all(value.shape == () for value in seen.values())
    n_p, n_a = np.sqrt(6), np.sqrt(0.25 + 1 + 4 + 10)
    np.testing.assert_allclose(seen["prediction_norm"], n_p, rtol=1e-6)
    np.testing.assert_allclose(seen["cosine"], -0.5 / (n_p * n_a), rtol=1e-5)


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

    eager = gdmam.diagnostics(one_step(optimizer))
    for name, value in step(optimizer.init(PARAMS)).items():
        np.testing.assert_allclose(value, eager[name], rtol=1e-6)


def test_a_state_without_gdmam_is_refused():
    with pytest.raises(ValueError, match="no GDMAM state found"):
        gdmam.diagnostics(optax.adam(0.1).init(PARAMS))
