"""A kind of problem whose data come from playing: a pole on a cart."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.kinds import networks
from benchmarks.kinds.kind import Kind


class Rollout(NamedTuple):
    """What a policy saw and did: shape ``(steps, games)``; observations have one more axis."""

    observations: jax.Array
    actions: jax.Array
    log_probabilities: jax.Array
    advantages: jax.Array
    returns: jax.Array


def _pole(state: jax.Array, right: jax.Array) -> jax.Array:
    """A fiftieth of a second of a pole on a cart (Barto, Sutton and Anderson, 1983)."""
    speed, angle, turn = jnp.moveaxis(state[..., 1:], -1, 0)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(right, 10.0, -10.0) + 0.05 * turn**2 * sine) / 1.1
    turning = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    speeding = push - 0.05 * turning * cosine / 1.1
    changes = jnp.stack([speed, speeding, turn, turning], axis=-1)
    return state + 0.02 * changes


def _fallen(state: jax.Array) -> jax.Array:
    return (jnp.abs(state[..., 0]) > 2.4) | (jnp.abs(state[..., 2]) > 0.2095)


GAMES, LENGTH = 8, 128
"""How many games are played at once, and how many steps a rollout has."""


def _begin(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, (*shape, 4), minval=-0.05, maxval=0.05)


def _features(params: Any, observations: jax.Array) -> jax.Array:
    scaled = observations / jnp.array([2.4, 2.0, 0.2, 2.0])
    return networks.apply(params["trunk"], scaled, last=True)


def _heads(params: Any, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logit of pushing to the right, and the value."""
    actor, critic = (networks.apply(params[name], found)[..., 0] for name in ("actor", "critic"))
    return actor, critic


def _advantages(values: jax.Array, final: jax.Array, done: jax.Array) -> jax.Array:
    """Generalised advantage estimates of games with a reward of 1 a step.

    Args:
      values: what the critic says, shape ``(steps, games)``.
      final: what it says of the state in which the rollout ends, shape ``(games,)``.
      done: whether the step was a game's last, shape ``(steps, games)``.
    """
    discount, smoothing = 0.99, 0.95

    def back(carry: Any, now: Any) -> tuple[Any, jax.Array]:
        ahead, advantage = carry
        value, over = now
        surprise = 1 + discount * jnp.where(over, 0, ahead) - value
        advantage = surprise + discount * smoothing * jnp.where(over, 0, advantage)
        return (value, advantage), advantage

    start = final, jnp.zeros_like(final)
    return jax.lax.scan(back, start, (values, done), reverse=True)[1]


def _rollout(params: Any, key: jax.Array) -> Rollout:
    first, again, chance = jax.random.split(key, 3)
    shape = LENGTH, GAMES
    draws = jax.random.uniform(chance, shape), _begin(again, shape)

    def play(state: jax.Array, draw: Any) -> tuple[jax.Array, Any]:
        logit, value = _heads(params, _features(params, state))
        right = draw[0] < jax.nn.sigmoid(logit)
        after = _pole(state, right)
        done = _fallen(after)
        log_probability = jax.nn.log_sigmoid(jnp.where(right, logit, -logit))
        after = jnp.where(done[:, None], draw[1], after)
        return after, (state, right, log_probability, value, done)

    last, played = jax.lax.scan(play, _begin(first, (GAMES,)), draws)
    states, right, log_probabilities, values, done = played
    advantages = _advantages(values, _heads(params, _features(params, last))[1], done)
    spread = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    return Rollout(states, right, log_probabilities, spread, advantages + values)


def _return(params: Any, key: jax.Array, part: int) -> jax.Array:
    """How many steps the pole stands, the mean of fifty games of at most 500."""

    def play(carry: Any, chance: jax.Array) -> tuple[Any, jax.Array]:
        state, alive = carry
        logit, _ = _heads(params, _features(params, state))
        state = _pole(state, chance < jax.nn.sigmoid(logit))
        return (state, alive & ~_fallen(state)), jnp.sum(alive)

    start, draws = jax.random.split(key)
    carry = _begin(start, (50,)), jnp.ones(50, bool)
    standing = jax.lax.scan(play, carry, jax.random.uniform(draws, (500, 50)))[1]
    return jnp.sum(standing) / 50


def actor_critic() -> Kind:
    """A pole on a cart, balanced by PPO whose policy and values share a trunk."""
    clip = 0.2

    def surrogate(params: Any, found: Any, batch: Rollout) -> jax.Array:
        logit, _ = _heads(params, found)
        log_probability = jax.nn.log_sigmoid(jnp.where(batch.actions, logit, -logit))
        ratio = jnp.exp(log_probability - batch.log_probabilities)
        gains = jnp.minimum(
            ratio * batch.advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * batch.advantages
        )
        entropy = jax.nn.softplus(logit) - logit * jax.nn.sigmoid(logit)
        return -jnp.mean(gains) - 0.01 * jnp.mean(entropy)

    def of_values(params: Any, found: Any, batch: Rollout) -> jax.Array:
        return 0.5 * jnp.mean((_heads(params, found)[1] - batch.returns) ** 2)

    return Kind(
        title="actor and critic (PPO)",
        losses=("clipped surrogate", "squared error of the values"),
        measure="return, at most 500",
        higher=True,
        init=lambda key: networks.several(key, trunk=(4, 32, 32), actor=(32, 1), critic=(32, 1)),
        sample=_rollout,
        features=lambda params, batch: _features(params, batch.observations),
        prediction=surrogate,
        alignment=of_values,
        score=_return,
        steps=60,
        trunk=True,
        epochs=8,
    )
