"""`over_pairs`: what it refuses, and extra arguments. What it makes work: tests/compatibility."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.conftest import skipped_under_strict_promotion

PARAMS = {"w": jnp.ones(2), "b": jnp.ones(1)}


def twice(optimizer):
    return optax.MultiSteps(optimizer, 2)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        (PARAMS, TypeError, r"update at b is float(32|64)\[1\]; expected a GradientPair"),
        (
            jax.tree.map(lambda leaf: gdmam.GradientPair(leaf, leaf[:1, None]), PARAMS),
            ValueError,
            "the two gradients at b must agree in shape",
        ),
    ],
)
def test_wrong_updates_are_refused_while_tracing(updates, error, message):
    optimizer = gdmam.over_pairs(twice, gdmam.gdmam(0.1))
    state = jax.eval_shape(optimizer.init, PARAMS)
    with pytest.raises(error, match=message):
        jax.eval_shape(optimizer.update, updates, state, PARAMS)


def steps_of_a_given_size():
    """An optimizer of pairs whose step is the ``value`` it is given, where it is given one."""

    def update(updates, state, params=None, *, value=1.0, **extra_args):
        del extra_args, params
        prediction = gdmam.unpair_gradients(updates)[0]
        return jax.tree.map(lambda g: value * g, prediction), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    "wrapper",
    [
        pytest.param(
            lambda tx: optax.MultiSteps(tx, 1),
            marks=skipped_under_strict_promotion("optax.MultiSteps"),
        ),
        lambda tx: optax.masked(tx, True),
    ],
)
def test_extra_arguments_have_their_effect_whatever_the_wrapper_takes(wrapper):
    optimizer = gdmam.over_pairs(wrapper, steps_of_a_given_size())
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    for value in (1.0, 3.0):
        updates, _ = optimizer.update(pairs, optimizer.init(PARAMS), PARAMS, value=value)
        np.testing.assert_allclose(updates["w"], value * np.ones(2))


def test_the_first_half_of_what_comes_out_is_the_update():
    """A wrapper that tells the halves apart: it doubles the second."""

    def uneven(optimizer):
        def update(updates, state, params=None):
            results, state = optimizer.update(updates, state, params)
            halves = jax.tree.map(
                lambda pair: gdmam.GradientPair(pair.prediction, 2 * pair.alignment),
                results,
                is_leaf=lambda node: isinstance(node, gdmam.GradientPair),
            )
            return halves, state

        return optax.GradientTransformation(optimizer.init, update)

    optimizer = gdmam.over_pairs(uneven, steps_of_a_given_size())
    updates, _ = optimizer.update(
        gdmam.pair_gradients(PARAMS, PARAMS), optimizer.init(PARAMS), PARAMS
    )
    np.testing.assert_allclose(updates["w"], np.ones(2))


def test_a_wrapper_without_extra_arguments_does_not_see_them():
    def plain(optimizer):
        def update(updates, state, params=None):
            return optimizer.update(updates, state, params)

        return optax.GradientTransformation(optimizer.init, update)

    optimizer = gdmam.over_pairs(plain, steps_of_a_given_size())
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    updates, _ = optimizer.update(pairs, optimizer.init(PARAMS), PARAMS, value=5.0)
    np.testing.assert_allclose(updates["w"], np.ones(2))


@skipped_under_strict_promotion("optax.MultiSteps")
def test_a_wrapper_sees_as_many_alignment_losses_as_are_said():
    optimizer = gdmam.over_pairs(
        lambda tx: optax.MultiSteps(tx, 2),
        gdmam.weighed(optax.identity(), gdmam.sum_weighting, alignment_losses=2),
        alignment_losses=2,
    )
    w, state = jnp.zeros(2), optimizer.init(jnp.zeros(2))
    for scale in (1.0, 3.0):
        pair = gdmam.GradientPair(scale * jnp.ones(2), (jnp.array([1.0, 0.0]), jnp.ones(2)))
        updates, state = optimizer.update(pair, state, w)
    np.testing.assert_allclose(updates, [2 + 1 + 1, 2 + 0 + 1])
