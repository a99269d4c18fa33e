"""What every row of the compatibility table is run by."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam

STEPS = 12


def example_params(dtype=jnp.float32):
    return {
        "trunk": {"kernel": np.linspace(-1, 1, 6).reshape(3, 2).astype(dtype)},
        "head": {"kernel": np.full((2, 2), 0.5, dtype), "bias": np.ones(2, dtype)},
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def example_pairs(params=None, steps=STEPS, seed=0):
    """A tree of pairs like ``params`` for every step, on a leading axis; norms of order one."""
    leaves, structure = jax.tree.flatten(example_params() if params is None else params)
    ends = np.cumsum([leaf.size for leaf in 2 * leaves])
    # One draw, cut to pieces on the host, where nothing is compiled.
    drawn = np.split(0.5 * np.asarray(normal(seed, (steps, ends[-1].item()))), ends[:-1], axis=1)
    gradients = [
        piece.reshape(steps, *leaf.shape).astype(leaf.dtype)
        for piece, leaf in zip(drawn, 2 * leaves, strict=True)
    ]
    prediction, alignment = gradients[: len(leaves)], gradients[len(leaves) :]
    return structure.unflatten(map(gdmam.GradientPair, prediction, alignment))


@dataclasses.dataclass
class Run:
    """What one optimizer did: parameters, updates and state after every step, stacked."""

    params: Any
    updates: Any
    states: Any
    initial_params: Any
    initial_state: Any

    def after(self, step):
        """Parameters and state after so many steps."""
        if step == 0:
            return self.initial_params, self.initial_state
        return jax.tree.map(lambda leaf: leaf[step - 1], (self.params, self.states))


@functools.cache
def compiled(optimizers, several, keywords):
    """One step of every optimizer, and a list with an entry for every time it is traced."""
    traces = []

    @jax.jit
    def step(carry, pair, extra):
        traces.append(None)
        if keywords:
            pair, extra["alignment"] = gdmam.unpair_gradients(pair)
        results = {}
        for name, transformation in optimizers:
            params, state = carry[name]
            given = pair[name] if several else pair
            update = optax.with_extra_args_support(transformation).update
            updates, state = update(given, state, params, **extra)
            jax.tree.map(check_update, updates, params)
            results[name] = (optax.apply_updates(params, updates), state, updates)
        return results

    return step, traces


def check_update(update, param):
    assert update.dtype == param.dtype
    assert update.shape == param.shape


def train(optimizers, params, pairs, extra=None, keywords=False):
    """Runs optimizers beside each other over the same pairs, with one compiled step.

    The same optimizers have one step in all tests of a module.

    Fails if a later step compiles again, if a state or a parameter changes its structure, shape,
    dtype or weak type between steps, or if an update is not of its parameter's dtype.

    Args:
      optimizers: a dictionary of optimizers.
      params: where they all start; or a dictionary with the optimizers' names.
      pairs: stacked pairs, see `example_pairs`; or a dictionary, if ``params`` is one.
      extra: extra arguments of ``update``, stacked like the pairs, if any.
      keywords: hand over the alignment gradients by the keyword ``alignment``.

    Returns:
      A dictionary of `Run`.
    """

    several = isinstance(params, dict) and params.keys() == optimizers.keys()
    step, traces = compiled(tuple(optimizers.items()), several, keywords)
    traced = len(traces)
    starts = params if several else dict.fromkeys(optimizers, params)
    start = {name: (starts[name], tx.init(starts[name])) for name, tx in optimizers.items()}
    # On the host slicing and stacking compile nothing. In a scan they take longer to compile than
    # the step, since every array of every state is stacked.
    inputs = jax.device_get((pairs, {} if extra is None else extra))
    carry, steps = start, []
    for number in range(jax.tree.leaves(inputs)[0].shape[0]):
        results = step(carry, *jax.tree.map(lambda leaf, at=number: leaf[at], inputs))
        carry = {name: result[:2] for name, result in results.items()}
        steps.append(results)
        if typed(carry) != typed(start):
            raise TypeError(f"the carry was {typed(start)}, and is {typed(carry)} after a step")
    assert len(traces) <= traced + 1, "a later step compiled again"
    history = jax.tree.map(stack, *steps)
    return {
        name: Run(
            params=history[name][0],
            states=history[name][1],
            updates=history[name][2],
            initial_params=start[name][0],
            initial_state=start[name][1],
        )
        for name in optimizers
    }


def typed(tree):
    """All that `jax.lax.scan` demands of a carry to stay the same."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jax.typeof, tree))
    return structure, leaves


def stack(*leaves):
    is_key = jax.dtypes.issubdtype(leaves[0].dtype, jax.dtypes.prng_key)
    return (jnp if is_key else np).stack(leaves)


def replay(updates):
    """Hands over recorded updates, stacked like the pairs, whatever it is given."""

    def update(given, step, params=None):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[step], updates), step + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def stateless(function):
    """A transformation ``function(updates, params, **extra) -> updates``, written by hand."""

    def update(updates, state, params=None, **extra):
        return function(updates, params, **extra), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def map_pairs(function, pairs, *rest):
    """Maps ``function(gradient, ...)`` over both gradients of every pair."""

    def both(pair, *others):
        return gdmam.GradientPair(
            function(pair.prediction, *others), function(pair.alignment, *others)
        )

    return jax.tree.map(both, pairs, *rest, is_leaf=lambda x: isinstance(x, gdmam.GradientPair))
