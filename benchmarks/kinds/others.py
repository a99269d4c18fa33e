"""Kinds of problems on other data: tables, atoms, letters, and a game."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from benchmarks.kinds import networks
from benchmarks.kinds.kind import Kind

BATCH = 64


def scales(standardised: bool = False) -> Kind:
    """Impedance and phase of a circuit (Friedman's second and third problem), in their units.

    The impedance's squares are a million times as large as the phase's. ``standardised`` divides
    each loss by the variance of what is learned.
    """
    makers = datasets.make_friedman2, datasets.make_friedman3
    found = [make(3000, random_state=0) for make in makers]
    inputs = found[0][0]
    inputs = jnp.asarray((inputs - inputs.mean(0)) / inputs.std(0), jnp.float32)
    targets = jnp.asarray(np.stack([values for _, values in found], axis=1), jnp.float32)
    mean, deviation = jnp.mean(targets, axis=0), jnp.std(targets, axis=0)
    parts = slice(1000, 1500), slice(1500, 3000)

    def sample(params: Any, key: jax.Array) -> Any:
        which = jax.random.randint(key, (BATCH,), 0, 1000)
        return inputs[which], targets[which]

    def features(params: Any, batch: Any) -> jax.Array:
        return networks.apply(params["trunk"], batch[0], last=True)

    def head(name: str, number: int) -> Any:
        def loss(params: Any, found: Any, batch: Any) -> jax.Array:
            value = networks.apply(params[name], found)[:, 0] * deviation[number] + mean[number]
            unit = deviation[number] if standardised else 1
            return jnp.mean(((value - batch[1][:, number]) / unit) ** 2)

        return loss

    heads = head("impedance", 0), head("phase", 1)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        batch = inputs[parts[part]], targets[parts[part]]
        found = features(params, batch)
        units = [1, 1] if standardised else deviation
        each = [jnp.sqrt(loss(params, found, batch)) / units[k] for k, loss in enumerate(heads)]
        return 100 * sum(each) / 2

    return Kind(
        title="regression, standardised" if standardised else "regression, units far apart",
        losses=("impedance", "phase"),
        measure="mean relative error of both, %",
        higher=False,
        init=lambda key: networks.several(key, trunk=(4, 32, 32), impedance=(32, 1), phase=(32, 1)),
        sample=sample,
        features=features,
        prediction=heads[0],
        alignment=heads[1],
        score=score,
        trunk=True,
    )


def _lennard_jones(positions: jax.Array) -> jax.Array:
    """Energy in units of the well's depth, of atoms at ``(atoms, 3)`` in those of its radius."""
    inverse = _distances(positions) ** -6.0
    return jnp.sum(4 * (inverse**2 - inverse)) / 2


def _distances(positions: jax.Array) -> jax.Array:
    """From each atom to the others, shape ``(atoms, atoms - 1)``."""
    count = len(positions)
    others = np.array([[j for j in range(count) if j != i] for i in range(count)])
    return jnp.linalg.norm(positions[:, None] - positions[others], axis=-1)


def forces() -> Kind:
    """Energies and forces of five atoms that shake, by a network of distances."""
    apex, radius = 0.9145, 0.6466
    angles = 2 * np.pi * np.arange(3) / 3
    triangle = np.stack([radius * np.cos(angles), radius * np.sin(angles), 0 * angles], axis=1)
    still = np.concatenate([triangle, [[0, 0, apex], [0, 0, -apex]]])
    moved = still + 0.03 * np.random.default_rng(0).normal(size=(1000, 5, 3))
    positions = jnp.asarray(moved, jnp.float32)
    energies, slopes = jax.vmap(jax.value_and_grad(_lennard_jones))(positions)
    atoms = len(still)
    shift = jnp.mean(energies)
    deviations = jnp.std(energies / atoms), jnp.std(slopes)
    parts = slice(300, 500), slice(500, 1000)
    centres = jnp.linspace(0.8, 2.2, 10)

    def energy(params: Any, position: jax.Array) -> jax.Array:
        near = jnp.exp(-(((_distances(position)[..., None] - centres) / 0.2) ** 2))
        # Of the order of the forces, when the network's output is of order one.
        return 10 * jnp.sum(networks.apply(params, jnp.sum(near, axis=1))) + shift

    def features(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        both = jax.value_and_grad(energy, argnums=1)
        return jax.vmap(both, in_axes=(None, 0))(params, batch[0])

    def of_energies(params: Any, found: Any, batch: Any) -> jax.Array:
        return jnp.mean(((found[0] - batch[1]) / atoms) ** 2)

    def of_forces(params: Any, found: Any, batch: Any) -> jax.Array:
        return jnp.mean((found[1] - batch[2]) ** 2)

    def sample(params: Any, key: jax.Array) -> Any:
        which = jax.random.randint(key, (16,), 0, 300)
        return positions[which], energies[which], slopes[which]

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        batch = tuple(each[parts[part]] for each in (positions, energies, slopes))
        found = features(params, batch)
        squares = of_energies(params, found, batch), of_forces(params, found, batch)
        each = [jnp.sqrt(s) / scale for s, scale in zip(squares, deviations, strict=True)]
        return 100 * sum(each) / 2

    return Kind(
        title="energies and forces",
        losses=("energy per atom", "forces"),
        measure="mean relative error of both, %",
        higher=False,
        init=lambda key: networks.init(key, 10, 32, 32, 1),
        sample=sample,
        features=features,
        prediction=of_energies,
        alignment=of_forces,
        score=score,
    )


class Rollout(NamedTuple):
    """What a policy saw and did: shape ``(steps, games)``, and one more axis of observations."""

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


def actor_critic() -> Kind:
    """A pole on a cart, balanced by PPO whose policy and values share a trunk."""
    games, length, discount, smoothing, clip = 8, 128, 0.99, 0.95, 0.2

    def features(params: Any, observations: jax.Array) -> jax.Array:
        scaled = observations / jnp.array([2.4, 2.0, 0.2, 2.0])
        return networks.apply(params["trunk"], scaled, last=True)

    def heads(params: Any, found: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(networks.apply(params[name], found)[..., 0] for name in ("actor", "critic"))

    def begin(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.uniform(key, (*shape, 4), minval=-0.05, maxval=0.05)

    def sample(params: Any, key: jax.Array) -> Rollout:
        first, again, chance = jax.random.split(key, 3)
        draws = jax.random.uniform(chance, (length, games)), begin(again, (length, games))

        def play(state: jax.Array, draw: Any) -> tuple[jax.Array, Any]:
            logit, value = heads(params, features(params, state))
            right = draw[0] < jax.nn.sigmoid(logit)
            after = _pole(state, right)
            done = _fallen(after)
            log_probability = jax.nn.log_sigmoid(jnp.where(right, logit, -logit))
            after = jnp.where(done[:, None], draw[1], after)
            return after, (state, right, log_probability, value, done)

        last, played = jax.lax.scan(play, begin(first, (games,)), draws)
        states, right, log_probabilities, values, done = played
        final = heads(params, features(params, last))[1]

        def back(carry: Any, now: Any) -> tuple[Any, jax.Array]:
            ahead, advantage = carry
            value, over = now
            surprise = 1 + discount * jnp.where(over, 0, ahead) - value
            advantage = surprise + discount * smoothing * jnp.where(over, 0, advantage)
            return (value, advantage), advantage

        start = final, jnp.zeros(games)
        _, advantages = jax.lax.scan(back, start, (values, done), reverse=True)
        spread = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
        return Rollout(states, right, log_probabilities, spread, advantages + values)

    def surrogate(params: Any, found: Any, batch: Rollout) -> jax.Array:
        logit, _ = heads(params, found)
        log_probability = jax.nn.log_sigmoid(jnp.where(batch.actions, logit, -logit))
        ratio = jnp.exp(log_probability - batch.log_probabilities)
        gains = jnp.minimum(
            ratio * batch.advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * batch.advantages
        )
        entropy = jax.nn.softplus(logit) - logit * jax.nn.sigmoid(logit)
        return -jnp.mean(gains) - 0.01 * jnp.mean(entropy)

    def of_values(params: Any, found: Any, batch: Rollout) -> jax.Array:
        return 0.5 * jnp.mean((heads(params, found)[1] - batch.returns) ** 2)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        def play(carry: Any, chance: jax.Array) -> tuple[Any, jax.Array]:
            state, alive = carry
            logit, _ = heads(params, features(params, state))
            state = _pole(state, chance < jax.nn.sigmoid(logit))
            return (state, alive & ~_fallen(state)), jnp.sum(alive)

        start, draws = jax.random.split(key)
        carry = begin(start, (50,)), jnp.ones(50, bool)
        standing = jax.lax.scan(play, carry, jax.random.uniform(draws, (500, 50)))[1]
        return jnp.sum(standing) / 50

    return Kind(
        title="actor and critic (PPO)",
        losses=("clipped surrogate", "squared error of the values"),
        measure="return, at most 500",
        higher=True,
        init=lambda key: networks.several(key, trunk=(4, 32, 32), actor=(32, 1), critic=(32, 1)),
        sample=sample,
        features=lambda params, batch: features(params, batch.observations),
        prediction=surrogate,
        alignment=of_values,
        score=score,
        steps=60,
        trunk=True,
        epochs=8,
    )


@functools.cache
def _letters() -> np.ndarray:
    """The descriptions of scikit-learn's data sets, one after the other, as numbers."""
    makers = ("iris", "wine", "breast_cancer", "diabetes", "digits", "linnerud")
    texts = [getattr(datasets, f"load_{name}")().DESCR.lower() for name in makers]
    return np.unique(list(" ".join(" ".join(texts).split())), return_inverse=True)[1]


def language_model() -> Kind:
    """The next letter, and as an auxiliary loss the one after it."""
    letters = jnp.asarray(_letters(), jnp.int32)
    context, count = 8, int(letters.max()) + 1
    ends = [len(letters) * share // 10 for share in (0, 7, 8, 10)]

    def windows(places: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = letters[places[:, None] + jnp.arange(context + 2)]
        return found[:, :context], found[:, context:]

    def sample(params: Any, key: jax.Array) -> Any:
        return windows(jax.random.randint(key, (BATCH,), 0, ends[1] - context - 2))

    def features(params: Any, batch: Any) -> jax.Array:
        ((embedding, _),) = params["embedding"]
        inputs = embedding[batch[0]].reshape(len(batch[0]), -1)
        return networks.apply(params["trunk"], inputs, last=True)

    def head(name: str, number: int) -> Any:
        return lambda params, found, batch: networks.cross_entropy(
            networks.apply(params[name], found), batch[1][:, number]
        )

    next_letter = head("next", 0)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        batch = windows(jnp.arange(ends[part + 1], ends[part + 2] - context - 2))
        return next_letter(params, features(params, batch), batch) / jnp.log(2)

    return Kind(
        title="language model",
        losses=("the next letter", "the letter after it"),
        measure="bits a letter",
        higher=False,
        init=lambda key: networks.several(
            key, embedding=(count, 8), trunk=(8 * context, 64), next=(64, count), after=(64, count)
        ),
        sample=sample,
        features=features,
        prediction=next_letter,
        alignment=head("after", 1),
        score=score,
        trunk=True,
    )
