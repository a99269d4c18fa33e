"""GDMAM with Linen modules and `TrainState`."""

import functools
import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import gdmam_jax as gdmam


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(2)(x)


class State(TrainState):
    batch_stats: dict


X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
Y = np.stack([X.sum(axis=1), X[:, 0]], axis=1)


@functools.cache
def variables():
    init = jax.jit(Model().init, static_argnames="train")
    return init(jax.random.key(0), X, train=False)


def losses(params, batch_stats, key):
    output, changed = Model().apply(
        {"params": params, "batch_stats": batch_stats},
        X,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats", "intermediates"],
    )
    (hidden,) = changed["intermediates"]["hidden"]
    return (jnp.mean((output - Y) ** 2), jnp.mean(hidden**2)), changed["batch_stats"]


def test_gradients_and_statistics_come_from_one_pass():
    """Batch statistics, dropout and sown intermediates go through ``aux``."""

    @jax.jit
    def both(params, batch_stats, key):
        def prediction_loss(params):
            (prediction, _), changed = losses(params, batch_stats, key)
            return prediction, changed

        paired = gdmam.value_and_paired_grad(losses, has_aux=True)(params, batch_stats, key)
        return paired, jax.value_and_grad(prediction_loss, has_aux=True)(params)

    (((prediction, _), stats), pairs), (expected, gradients) = both(
        **variables(), key=jax.random.key(2)
    )
    found = (prediction, stats), gdmam.unpair_gradients(pairs)[0]
    chex.assert_trees_all_close(found, (expected, gradients), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "optimizer",
    [
        gdmam.gdmam(0.05),
        gdmam.gdmam_released(0.05),
        optax.chain(gdmam.allocate(), optax.adamw(0.05)),
        gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.05)),
    ],
)
def test_train_state(optimizer):
    state = State.create(apply_fn=Model().apply, tx=optimizer, **variables())
    state = state.replace(step=jnp.asarray(0))
    types = jax.tree.map(jax.typeof, state)

    @jax.jit
    def step(state, key):
        (values, batch_stats), pairs = gdmam.value_and_paired_grad(losses, has_aux=True)(
            state.params, state.batch_stats, key
        )
        return state.apply_gradients(grads=pairs, batch_stats=batch_stats), values

    history = []
    for key in jax.random.split(jax.random.key(2), 60):
        state, (prediction, _) = step(state, key)
        history.append(prediction)
    assert step._cache_size() == 1
    assert jax.tree.map(jax.typeof, state) == types
    assert sum(history[-5:]) < 0.6 * sum(history[:5])
    assert state.step == 60


def test_a_train_state_is_written_and_read():
    params = {"w": jnp.ones(2)}
    state = TrainState.create(apply_fn=None, params=params, tx=gdmam.gdmam(0.1))
    state = state.apply_gradients(grads=gdmam.pair_gradients(params, params))
    fresh = TrainState.create(apply_fn=None, params=params, tx=state.tx)
    restored = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state.opt_state)), state.opt_state)
