"""Paired gradients: equal to `jax.grad` of each loss, from one forward pass."""

import collections
from functools import partial

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import gdmam_jax as gdmam
from tests.conftest import skipped_under_strict_promotion

X = jnp.linspace(-1, 1, 6).reshape(2, 3)
PARAMS = {"shared": jnp.linspace(0.1, 0.9, 12).reshape(3, 4), "heads": (jnp.ones(4), jnp.ones(4))}


def losses(params, x=X):
    hidden = jnp.tanh(x @ params["shared"])
    return jnp.sum((hidden @ params["heads"][0]) ** 2), jnp.sum(
        jnp.cos(hidden @ params["heads"][1])
    )


def assert_pairs(pairs, prediction, alignment, rtol=1e-6):
    for tree, expected in zip(gdmam.unpair_gradients(pairs), (prediction, alignment), strict=True):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-7), tree, expected)


def separately(loss_fn, *args, argnums=0, **kwargs):
    return [jax.grad(lambda *a, i=i: loss_fn(*a, **kwargs)[i], argnums)(*args) for i in range(2)]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_equals_the_gradient_of_each_loss(wrap):
    values, pairs = wrap(gdmam.value_and_paired_grad(losses))(PARAMS)
    np.testing.assert_allclose(values, losses(PARAMS), rtol=1e-6)
    assert_pairs(pairs, *separately(losses, PARAMS))


@pytest.mark.parametrize("argnums", [0, 2, -1, (0,), (0, 2), (-1, 0)])
def test_argnums_are_those_of_jax(argnums):
    def loss_fn(a, x, b, *, power):
        return jnp.sum(a * x * b["v"]) ** power, jnp.sum(a * b["v"] ** 2)

    args = jnp.arange(1.0, 4.0), jnp.array([0.5, 1.5, -1.0]), {"v": jnp.array([2.0, 1.0, 3.0])}
    _, pairs = gdmam.value_and_paired_grad(loss_fn, argnums)(*args, power=2)
    expected = separately(loss_fn, *args, argnums=argnums, power=2)
    assert_pairs(pairs, *expected)
    assert isinstance(pairs, tuple) == isinstance(argnums, tuple)


def test_static_arguments_are_found_by_their_names():
    def losses(w, doubled):
        return jnp.sum(w**2), jnp.sum(w) * (2 if doubled else 1)

    step = jax.jit(gdmam.value_and_paired_grad(losses), static_argnames="doubled")
    assert step(jnp.ones(2), True)[1].alignment.tolist() == [2, 2]


def test_aux_is_handed_through():
    def loss_fn(params):
        values = losses(params)
        return values, {"sum": values[0] + values[1], "text": 3}

    (values, aux), pairs = gdmam.value_and_paired_grad(loss_fn, has_aux=True)(PARAMS)
    np.testing.assert_allclose(aux["sum"], sum(losses(PARAMS)), rtol=1e-6)
    np.testing.assert_allclose(values, losses(PARAMS), rtol=1e-6)
    assert aux["text"] == 3
    assert_pairs(pairs, *separately(losses, PARAMS))


def test_the_losses_are_evaluated_once():
    calls = []

    def loss_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return losses(params)

    jax.block_until_ready(jax.jit(gdmam.value_and_paired_grad(loss_fn))(PARAMS))
    jax.effects_barrier()
    assert len(calls) == 1


def count(jaxpr, primitive="dot_general"):
    """How often a primitive occurs in a program, those inside called programs included."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == primitive
        total += sum(
            count(inner, primitive) for inner in jax.extend.core.jaxprs_in_params(equation.params)
        )
    return total


def test_work_of_one_loss_is_not_done_for_the_other():
    """Matrix products of: encoder forward and weight gradient (2 losses), each head's own three."""

    def two_towers(params, x):
        hidden = x @ params["shared"]
        return (
            jnp.sum(jnp.sin(hidden @ params["prediction"])),
            jnp.sum(jnp.sin(hidden @ params["alignment"])),
        )

    params = {name: jnp.ones((4, 4)) for name in ("shared", "prediction", "alignment")}
    program = jax.make_jaxpr(gdmam.value_and_paired_grad(two_towers))(params, jnp.ones((2, 4)))
    # Forward 1 + 1 + 1; backward, for each loss: its head's weights, the hidden units, the encoder.
    assert count(program.jaxpr) == 3 + 2 * 3

    wrapped = jax.make_jaxpr(gdmam.value_and_paired_grad(jax.jit(two_towers)))
    assert count(wrapped(params, jnp.ones((2, 4))).jaxpr) == 3 + 2 * 3

    def only_prediction(params, x):
        return two_towers(params, x)[0], jnp.sum(params["alignment"] ** 2)

    program = jax.make_jaxpr(gdmam.value_and_paired_grad(only_prediction))
    # The products that no result needs (the unused head's) are left to be removed by XLA.
    assert count(program(params, jnp.ones((2, 4))).jaxpr) <= 3 + 3


def test_random_draws_are_the_same_for_both_gradients():
    def loss_fn(w, key):
        kept = jax.random.bernoulli(key, 0.5, w.shape).astype(w.dtype)
        return jnp.sum(kept * w), jnp.sum(2 * kept * w)

    _, pair = gdmam.value_and_paired_grad(loss_fn)(jnp.ones(64), jax.random.key(0))
    assert 0 < np.sum(pair.prediction) < 64
    np.testing.assert_array_equal(pair.alignment, 2 * pair.prediction)


def test_checkpointed_and_custom_gradients():
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, cotangent: (2 * cotangent,))

    def loss_fn(params):
        prediction, alignment = jax.checkpoint(losses)(params)
        return doubled(prediction), alignment

    _, pairs = jax.jit(gdmam.value_and_paired_grad(loss_fn))(PARAMS)
    prediction, alignment = separately(losses, PARAMS)
    assert_pairs(pairs, jax.tree.map(lambda leaf: 2 * leaf, prediction), alignment)


def test_vmap_scan_and_control_flow():
    def loss_fn(w, x):
        final, _ = jax.lax.scan(lambda c, _: (jnp.sin(c * w), None), x, length=3)
        return jax.lax.cond(x > 0, jnp.square, jnp.sin, final), w**2 * final

    ws, xs = jnp.array([0.5, 1.0]), jnp.array([-0.3, 0.7])
    _, pairs = jax.vmap(gdmam.value_and_paired_grad(loss_fn))(ws, xs)
    for row in range(2):
        expected = separately(loss_fn, ws[row], xs[row])
        assert_pairs(jax.tree.map(lambda leaf, row=row: leaf[row], pairs), *expected)


@skipped_under_strict_promotion("the loss")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradients_have_the_dtype_of_their_parameters(dtype):
    params = {"a": jnp.ones(3, dtype), "b": jnp.ones(3, jnp.float32)}
    _, pairs = gdmam.value_and_paired_grad(
        lambda p: (jnp.sum(p["a"] * p["b"]), jnp.sum(p["a"] ** 2))
    )(params)
    assert (pairs["a"].prediction.dtype, pairs["b"].alignment.dtype) == (dtype, jnp.float32)
    assert float(jnp.sum(jnp.abs(pairs["b"].alignment))) == 0


def test_a_loss_of_no_parameter_and_plain_numbers():
    values, pair = gdmam.value_and_paired_grad(lambda w: (w * 3.0, 0.0))(2.0)
    assert [float(value) for value in values] == [6, 0]
    assert (float(pair.prediction), float(pair.alignment)) == (3, 0)


Layers = collections.namedtuple("Layers", ["kernel", "bias"])


def test_pairing_and_unpairing_keep_any_structure():
    tree = {"layers": [Layers(jnp.ones((2, 2)), jnp.zeros(2))], "none": None}
    prediction, alignment = gdmam.unpair_gradients(
        gdmam.pair_gradients(tree, jax.tree.map(lambda leaf: leaf + 1, tree))
    )
    assert jax.tree.structure(prediction) == jax.tree.structure(tree)
    np.testing.assert_array_equal(alignment["layers"][0].bias, [1, 1])


GOOD = gdmam.GradientPair(jnp.ones(3), jnp.ones(3))
BAD_LOSSES = {
    "one number": (lambda w: jnp.sum(w), "two losses"),
    "three": (lambda w: (jnp.sum(w),) * 3, "two losses.*3 values"),
    "a vector": (lambda w: (w, jnp.sum(w)), r"prediction loss.*scalar.*float(32|64)\[3\]"),
    "an integer": (lambda w: (jnp.sum(w), jnp.array(1)), "alignment loss.*floating.*int(32|64)"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_function_must_return_two_scalars(name):
    loss_fn, message = BAD_LOSSES[name]
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(gdmam.value_and_paired_grad(loss_fn), jnp.ones(3))


def test_aux_must_be_returned_beside_the_losses():
    with pytest.raises(TypeError, match=r"has_aux=True.*aux"):
        gdmam.value_and_paired_grad(lambda w: jnp.sum(w), has_aux=True)(jnp.ones(3))


def test_only_floating_point_parameters_are_differentiated():
    params = {"w": jnp.ones(3), "steps": {"count": jnp.arange(3)}}
    with pytest.raises(TypeError, match=r"steps/count has dtype int(32|64); expected.*floating"):
        jax.eval_shape(gdmam.value_and_paired_grad(lambda p: (0.0, 0.0)), params)


def test_argnums_must_exist():
    with pytest.raises(TypeError, match=r"position 2.*1 positional"):
        gdmam.value_and_paired_grad(losses, argnums=2)(PARAMS)


def test_what_cannot_be_paired_is_named():
    tree = {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    other_shape = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}}
    other_dtype = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)
    integers = jax.tree.map(lambda leaf: leaf.astype(int), tree)
    with pytest.raises(ValueError, match=r"layer/kernel.*float\d+\[2, 3\].*float\d+\[3, 2\]"):
        jax.eval_shape(gdmam.pair_gradients, tree, other_shape)
    with pytest.raises(ValueError, match=r"layer/bias.*float(32|64).*bfloat16"):
        jax.eval_shape(gdmam.pair_gradients, tree, other_dtype)
    with pytest.raises(TypeError, match=r"layer/bias.*int(32|64); expected.*floating"):
        jax.eval_shape(gdmam.pair_gradients, integers, integers)
    with pytest.raises(ValueError, match="one structure"):
        gdmam.pair_gradients(tree, {"layer": {"kernel": jnp.ones((2, 3))}})
    with pytest.raises(TypeError, match=r"layer/bias is float\d+\[3\]; expected a GradientPair"):
        gdmam.unpair_gradients(tree)
