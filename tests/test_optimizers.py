"""`summed`, `weighed` and `gdmam`: what they do to a pair, against formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.conftest import skipped_under_strict_promotion

PAIR = gdmam.GradientPair(jnp.array([1.0, 3.0]), jnp.array([4.0, -2.0]))


def one_update(optimizer, pair=PAIR, params=None):
    params = jax.tree.map(np.zeros_like, pair.prediction) if params is None else params
    first = jax.jit(lambda pair, params: optimizer.update(pair, optimizer.init(params), params))
    return first(pair, params)[0]


def test_summed_weighs_both_gradients():
    optimizer = gdmam.summed(optax.sgd(1.0), prediction_weight=2.0, alignment_weight=0.5)
    np.testing.assert_array_equal(one_update(optimizer), [-4, -5])


def test_summed_weighs_every_alignment_gradient():
    pair = gdmam.GradientPair(PAIR.prediction, (PAIR.alignment, 10 * PAIR.alignment))
    optimizer = gdmam.summed(optax.sgd(1.0), alignment_weight=0.5)
    np.testing.assert_array_equal(one_update(optimizer, pair), [-23, 8])


@pytest.mark.parametrize(("dtype", "large"), [(jnp.bfloat16, 256), (jnp.float16, 2048)])
def test_sums_keep_half_precision_and_are_taken_in_float32(dtype, large):
    """Adding 1 twice to the large number changes nothing in half precision."""
    one = jnp.ones(2, dtype)
    pair = gdmam.GradientPair(jnp.full(2, large, dtype), (one, one))
    for optimizer in (
        gdmam.summed(optax.identity()),
        gdmam.weighed(optax.identity(), gdmam.sum_weighting, alignment_losses=2),
    ):
        update = one_update(optimizer, pair)
        assert update.dtype == dtype
        np.testing.assert_array_equal(update, jnp.full(2, large + 2, dtype))


def test_float16_sums_are_cut_and_not_infinite():
    pair = gdmam.GradientPair(jnp.full(2, 6e4, jnp.float16), jnp.full(2, 6e4, jnp.float16))
    assert float(one_update(gdmam.summed(optax.identity()), pair)[0]) == 65504


@skipped_under_strict_promotion("optax.MultiSteps")
@pytest.mark.parametrize("wrap", [gdmam.summed, lambda tx: gdmam.weighed(tx, gdmam.sum_weighting)])
def test_extra_arguments_pass_through_multi_steps(wrap):
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    optimizer, w = wrap(optax.MultiSteps(inner, 1)), jnp.ones(2)
    optimizer.update(gdmam.GradientPair(w, w), optimizer.init(w), w, value=3.0)
    assert {float(value) for value in seen} == {3.0}


def test_weighed_by_constants_is_summed():
    for weights in ((1.0, 1.0), (2.0, 0.5)):
        found = one_update(gdmam.weighed(optax.sgd(1.0), gdmam.constant_weighting(*weights)))
        np.testing.assert_array_equal(found, one_update(gdmam.summed(optax.sgd(1.0), *weights)))


def test_weighed_by_pcgrad_is_pcgrad(x64):
    g_p, g_a = np.array([1.0, 2.0, 0.5]), np.array([-1.0, 0.5, -2.0])
    product = g_p @ g_a
    expected = g_p - product / (g_a @ g_a) * g_a + g_a - product / (g_p @ g_p) * g_p
    pair = gdmam.GradientPair(jnp.asarray(g_p), jnp.asarray(g_a))
    found = one_update(gdmam.weighed(optax.identity(), gdmam.pcgrad_weighting), pair)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    agreeing = gdmam.GradientPair(pair.prediction, -pair.alignment)
    found = one_update(gdmam.weighed(optax.identity(), gdmam.pcgrad_weighting), agreeing)
    np.testing.assert_allclose(found, g_p - g_a, rtol=1e-12)


def test_weighed_sees_running_means_and_scopes():
    seen = []

    def weighting(gramian, norms):
        seen.append((gramian.shape, norms.shape))
        return norms

    optimizer = gdmam.weighed(optax.scale(-1.0), weighting, scope=gdmam.leaf_scope)
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0, 0.0])}
    pairs = gdmam.pair_gradients(params, params)
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(pairs, state, params)
    assert seen == [((2, 2, 2), (2, 2))]
    ratio = float(updates["b"][0] / updates["a"][0])
    np.testing.assert_allclose(ratio, (2 * 4 * 4) / (2 * 3 * 3), rtol=1e-6)


def test_default_weight_decay_and_mask_of_gdmam_against_the_formula():
    params = {"kernel": np.float32([2, -1]), "bias": np.float32([3])}
    pairs = gdmam.pair_gradients(params, params)
    rate = 0.5

    def update(**arguments):
        return one_update(gdmam.gdmam(rate, **arguments), pairs, params)

    bare = update(weight_decay=0.0)
    by_default, masked = update(), update(weight_decay=0.1, mask={"kernel": True, "bias": False})
    for name, leaf in params.items():
        np.testing.assert_allclose(by_default[name], bare[name] - rate * 1e-4 * leaf, rtol=1e-6)
    np.testing.assert_allclose(
        masked["kernel"], bare["kernel"] - rate * 0.1 * params["kernel"], rtol=1e-6
    )
    np.testing.assert_array_equal(masked["bias"], bare["bias"])
    mask = {"kernel": True, "bias": False}
    scheduled = update(weight_decay=lambda count: 0.1, mask=mask)
    np.testing.assert_array_equal(scheduled["kernel"], masked["kernel"])
    # The first step of a bias-corrected momentum over the root of its own square is the sign.
    for name, leaf in params.items():
        np.testing.assert_allclose(bare[name], -rate * np.sign(leaf), rtol=1e-6)


def test_the_preference_can_be_injected_and_scheduled():
    def make(preference):
        return gdmam.scale_by_gdmam(
            weighting=gdmam.unit_weighting(preference=preference),
            gate=gdmam.open_gate,
            momentum=gdmam.constant_momentum(initial=0.0),
        )

    optimizer = optax.inject_hyperparams(make)(preference=optax.linear_schedule(0.5, 1.5, 2))
    state = optimizer.init(jnp.zeros(2))
    pair = gdmam.GradientPair(jnp.array([2.0, 0.0]), jnp.array([0.0, 5.0]))
    step = jax.jit(optimizer.update)
    for preference in (0.5, 1.0, 1.5):
        update, state = step(pair, state)
        np.testing.assert_allclose(update, [1, preference], rtol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "weights"),
    [
        (gdmam.gdmam(0.1), [0.5, 0.2]),
        (gdmam.allocate(), [0.5, 0.2]),
        (gdmam.scale_by_gdmam(), [1.75, 0.7]),
    ],
)
def test_the_default_weights_are_unit_and_config_without_a_second_moment(optimizer, weights):
    pair = gdmam.GradientPair(np.float32([2, 0]), np.float32([0, 5]))
    start = np.zeros(2, np.float32)
    _, state = jax.jit(lambda: optimizer.update(pair, optimizer.init(start), start))()
    found = gdmam.diagnostics(state)
    found = [float(found[f"{loss}_weight"]) for loss in ("prediction", "alignment")]
    np.testing.assert_allclose(found, weights, rtol=1e-6)


@pytest.mark.parametrize("preference", [-0.5, [1.0, -1.0]])
def test_a_negative_preference_is_refused(preference):
    with pytest.raises(ValueError, match="preference"):
        gdmam.unit_weighting(jnp.eye(2), jnp.ones(2), preference=preference)


W = jnp.ones(2)
ONES = gdmam.GradientPair(W, W)
DELETED = jnp.ones(2)
DELETED.delete()


def gated(value):
    optimizer = gdmam.gdmam(0.1, gate=lambda cosine, ratio: value)
    return optimizer.update(ONES, optimizer.init(W), W)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gdmam.scale_by_gdmam(b2="0.9"), TypeError, "b2 must be a number, got '0.9'"),
        (lambda: gdmam.scale_by_gdmam(eps=None), TypeError, "eps must be a number, got None"),
        (lambda: gdmam.gdmam(0.1, weight_decay=jnp.inf), ValueError, r"lie in \[0.0, inf\)"),
        (lambda: gdmam.gdmam(0.1, weight_decay=[0.1]), TypeError, "must be a number"),
        (lambda: gdmam.gdmam(np.array([0.1])), TypeError, "learning_rate must be a number"),
        (
            lambda: jax.eval_shape(
                optax.inject_hyperparams(gdmam.clip_by_recent_norm)(factor=2.0).init, W
            ),
            TypeError,
            "the window must be a whole number.*static_args",
        ),
        (lambda: gdmam.constant_weighting(jnp.nan, 1), ValueError, "each weight must lie in"),
        (
            lambda: gdmam.constant_weighting(jnp.eye(2), None),
            TypeError,
            r"give the optimizer what it returns, weighting=constant_weighting\(",
        ),
        (lambda: gdmam.summed(None), TypeError, "expected an Optax optimizer, got None"),
        (lambda: gdmam.scale_by_gdmam().update(ONES, 3, W), TypeError, "a GDMAMState, got int"),
        (lambda: gated(None), ValueError, "gate must return 2 factors.*got NoneType"),
        (lambda: gated((None, 1)), ValueError, "gate must return 2 factors.*NoneType"),
        (lambda: gdmam.decompose(gdmam.GradientPair(DELETED, DELETED)), ValueError, "deleted"),
        (lambda: gdmam.gdmam(0.1).init({"d": jnp.float32}), TypeError, "parameter at d is"),
        (lambda: gdmam.clip_by_recent_norm().init({"w": "text"}), TypeError, "at w is str"),
        (
            lambda: gdmam.value_and_paired_grad(lambda w: (w, w))({"n": 3}),
            TypeError,
            "argument 0 .* at n has dtype int.*give them to the loss function in another argument",
        ),
        (
            lambda: optax.apply_updates(W, gdmam.pair_gradients(W, W)),
            TypeError,
            r"Leaves that optax.masked leaves out are still pairs: use optax.partition",
        ),
        (
            lambda: gdmam.value_and_paired_grad(lambda w: ("a", "b"))(W),
            TypeError,
            "prediction loss must be a floating-point scalar, got str",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "optimizer",
    [
        gdmam.gdmam(0.1),
        gdmam.gdmam_released(),
        gdmam.summed(optax.adamw(0.1)),
        gdmam.weighed(optax.adamw(0.1), gdmam.pcgrad_weighting),
    ],
)
def test_parameters_of_another_shape_are_refused(optimizer):
    """They would broadcast: to an update of shape (2, 2)."""
    with pytest.raises(ValueError, match=r"array of shape \(2, 1\)|parameter's \(2, 1\)"):
        optimizer.update(ONES, optimizer.init(W), W[:, None])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_an_overflow_reaches_the_guards_behind_a_sum_in_half_precision(dtype):
    """What is too large for the dtype, but not for float32, is cut at its largest number."""
    limit = float(jnp.finfo(dtype).max)
    cut = limit if dtype == jnp.float16 else jnp.inf
    gradient = jnp.array([jnp.inf, 1, 0.75 * limit], dtype)
    pair = gdmam.GradientPair(gradient, gradient)
    update = one_update(gdmam.summed(optax.identity()), pair)
    np.testing.assert_array_equal(update, jnp.array([jnp.inf, 2, cut], dtype))


@pytest.mark.parametrize("names", [("prediction", "b"), ["prediction"]])
def test_no_alignment_loss_is_named_prediction(names):
    with pytest.raises(ValueError, match="alignment_losses names one 'prediction'"):
        gdmam.gdmam(0.1, alignment_losses=names)
