"""`over_pairs`: what it refuses, and extra arguments. What it makes work: tests/compatibility."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gdmam_jax as gdmam

PARAMS = {"w": jnp.ones(2), "b": jnp.ones(1)}


def twice(optimizer):
    return optax.MultiSteps(optimizer, 2)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        (PARAMS, TypeError, r"update at b is float32\[1\]; expected a GradientPair"),
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


@pytest.mark.parametrize("wrapper", [twice, lambda optimizer: optax.masked(optimizer, True)])
def test_extra_arguments_pass_whatever_the_wrapper_takes(wrapper):
    optimizer = gdmam.over_pairs(wrapper, gdmam.gdmam(0.1))
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    optimizer.update(pairs, optimizer.init(PARAMS), PARAMS, value=1.0)


def test_a_wrapper_without_extra_arguments_does_not_see_them():
    def plain(optimizer):
        def update(updates, state, params=None):
            return optimizer.update(updates, state, params)

        return optax.GradientTransformation(optimizer.init, update)

    optimizer = gdmam.over_pairs(plain, gdmam.gdmam(0.1))
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    optimizer.update(pairs, optimizer.init(PARAMS), PARAMS, value=1.0)
