"""Kinds of problems on other data: tables, atoms and letters."""

import functools
from typing import Any

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
