"""Training every method of a program, with every rate and seed, all at once."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks.kinds.kind import Kind
from benchmarks.kinds.methods import optimizer

Program = str | Callable[[Any, jax.Array], optax.GradientTransformation]


class Runs(NamedTuple):
    """The results of each run, shape ``(runs,)``.

    Attributes:
      chosen_by: the score on the part that chooses rates and factors.
      score: the score that is reported.
      cosine: of the two gradients, the mean over the steps.
      ratio: norm of the alignment gradient over that of the prediction gradient, the geometric
        mean over the steps.
    """

    chosen_by: np.ndarray
    score: np.ndarray
    cosine: np.ndarray
    ratio: np.ndarray


def train(kind: Kind, program: Program, rates: Any, settings: Any, seeds: Any) -> Runs:
    """Trains one model for each triple of rate, setting and seed.

    Args:
      kind: of problem.
      program: see `Method`; or one of your own, ``(rate, setting) -> optimizer of pairs``.
      rates: learning rates at the start, which fall along half a cosine; shape ``(runs,)``.
      settings: see `Method`.
      seeds: of parameters and batches.
    """
    given = (jnp.asarray(rates, jnp.float32), jnp.asarray(settings, jnp.float32))
    found = _program(kind, program)(*given, jnp.asarray(seeds, jnp.uint32))
    return Runs(*(np.asarray(each, np.float64) for each in found))


@functools.cache
def _program(kind: Kind, program: Program) -> Any:
    def run(rate: jax.Array, setting: jax.Array, seed: jax.Array) -> tuple[jax.Array, ...]:
        first, second, third, *held_out = jax.random.split(jax.random.key(seed), 5)
        falling = optax.schedules.cosine_decay_schedule(1.0, kind.steps * kind.epochs)
        start, update = stepper(kind, program, lambda count: rate * falling(count), setting)

        adam = optax.adam(lambda count: rate * falling(count))

        def step(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            model, opponent = carry
            batch = kind.sample(model[0], key)
            given = batch if opponent is None else (batch, opponent[0])
            model, seen = jax.lax.scan(lambda m, _: update(m, given), model, length=kind.epochs)
            if opponent is not None:
                slope = jax.grad(kind.opponent.loss)(opponent[0], model[0], batch)
                updates, state = adam.update(slope, opponent[1])
                opponent = optax.apply_updates(opponent[0], updates), state
            return (model, opponent), seen

        params, opponent = kind.init(first), None
        if kind.opponent is not None:
            against = kind.opponent.init(third)
            opponent = against, adam.init(against)
        keys = jax.random.split(second, kind.steps)
        carry = (params, start(params)), opponent
        ((params, _), _), (cosines, ratios) = jax.lax.scan(step, carry, keys)
        scores = [kind.score(params, key, part) for part, key in enumerate(held_out)]
        return *scores, jnp.mean(cosines), jnp.exp(jnp.mean(ratios))

    return jax.jit(jax.vmap(run))


def stepper(kind: Kind, program: Program, rate: Any, setting: jax.Array) -> tuple[Any, Any]:
    """How the optimizer starts, and an update ``(carry, batch) -> (carry, seen)``, see `_seen`."""

    def losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        found = kind.features(params, batch)
        return kind.prediction(params, found, batch), kind.alignment(params, found, batch)

    if program == "fork":
        return _forked(kind, optax.adam(rate))

    def make(last: Any = None) -> Any:
        if callable(program):
            return program(rate, setting)
        return optimizer(program, rate, setting, last)

    def update(carry: Any, batch: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(losses)(params, batch)
        chosen = make(kind.last and kind.last(pairs))
        updates, state = chosen.update(pairs, state, params, value=values)
        return (optax.apply_updates(params, updates), state), _seen(state)

    return make().init, update


def _forked(kind: Kind, adam: optax.GradientTransformation) -> tuple[Any, Any]:
    def summed(params: Any, state: Any, batch: Any) -> jax.Array:
        first, second = gdmam.fork(kind.features(params, batch), 2, state=state)
        return kind.prediction(params, first, batch) + kind.alignment(params, second, batch)

    def start(params: Any) -> tuple[Any, Any]:
        return adam.init(params), gdmam.fork_state(2)

    def update(carry: Any, batch: Any) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, (state, fork) = carry
        gradient, fork = jax.grad(summed, argnums=(0, 1))(params, fork, batch)
        updates, state = adam.update(gradient, state, params)
        return (optax.apply_updates(params, updates), (state, fork)), _seen(fork)

    return start, update


def _seen(state: Any) -> tuple[jax.Array, jax.Array]:
    """The cosine of the two gradients, and the logarithm of the ratio of their norms."""
    seen = gdmam.diagnostics(state)
    norms = (jnp.maximum(seen[f"{name}_norm"], 1e-12) for name in ("alignment", "prediction"))
    longer, shorter = map(jnp.log, norms)
    return seen["cosine"], longer - shorter
