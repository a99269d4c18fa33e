"""`summed`, the baseline. `gdmam` itself: tests/test_transform.py."""

import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam


def test_summed_weighs_both_gradients():
    optimizer = gdmam.summed(optax.sgd(1.0), prediction_weight=2.0, alignment_weight=0.5)
    pair = gdmam.GradientPair(jnp.array([1.0, 3.0]), jnp.array([4.0, -2.0]))
    update, _ = optimizer.update(pair, optimizer.init(jnp.zeros(2)))
    np.testing.assert_array_equal(update, [-4, -5])
