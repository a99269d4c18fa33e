"""Kinds of problems whose alignment loss is a regulariser that a constant answer also satisfies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits, make_multilabel_classification

from benchmarks.kinds import networks
from benchmarks.kinds.kind import Kind

INTERVAL = 0.2
"""Between two points of a trajectory."""


def trajectories(field: Any, starts: jax.Array, count: int) -> jax.Array:
    """Points after the starts, ``(n, d)``, along a vector field; shape ``(n, count, d)``."""

    def step(at: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        first = field(at)
        second = field(at + INTERVAL / 2 * first)
        third = field(at + INTERVAL / 2 * second)
        last = field(at + INTERVAL * third)
        at = at + INTERVAL / 6 * (first + 2 * second + 2 * third + last)
        return at, at

    return jnp.moveaxis(jax.lax.scan(step, starts, length=count)[1], 0, 1)


def conservation() -> Kind:
    """A neural ordinary differential equation of a pendulum, whose energy it should conserve.

    It learns from 30 short trajectories with noise, and is judged on long ones without. A pendulum
    that stays at rest conserves its energy, too.
    """
    random = np.random.default_rng(0)
    starts = jnp.asarray(random.uniform([-2, -1], [2, 1], (600, 2)), jnp.float32)

    def pendulum(at: jax.Array) -> jax.Array:
        return jnp.stack([at[..., 1], -jnp.sin(at[..., 0])], axis=-1)

    def energy(at: jax.Array) -> jax.Array:
        return at[..., 1] ** 2 / 2 + 1 - jnp.cos(at[..., 0])

    exact = jnp.concatenate([starts[:, None], trajectories(pendulum, starts, 30)], axis=1)
    noise = jnp.asarray(random.normal(size=exact.shape), jnp.float32)
    training = (exact + 0.1 * noise)[:30, :9]
    parts = slice(100, 200), slice(200, 600)

    def follow(params: Any, starts: jax.Array, count: int) -> jax.Array:
        return trajectories(lambda at: networks.apply(params, at), starts, count)

    def sample(params: Any, key: jax.Array) -> jax.Array:
        return training[jax.random.randint(key, (16,), 0, len(training))]

    def drift(params: Any, found: Any, batch: Any) -> jax.Array:
        return jnp.mean((energy(found) - energy(batch[:, :1])) ** 2)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        wanted = exact[parts[part]]
        found = follow(params, wanted[:, 0], 30)
        return 100 * jnp.sqrt(jnp.mean((found - wanted[:, 1:]) ** 2) / jnp.var(wanted))

    return Kind(
        title="neural ODE, conservation",
        losses=("trajectories", "drift of the energy"),
        measure="relative error, %",
        higher=False,
        init=lambda key: networks.init(key, 2, 32, 32, 2),
        sample=sample,
        features=lambda params, batch: follow(params, batch[:, 0], 8),
        prediction=lambda params, found, batch: jnp.mean((found - batch[:, 1:]) ** 2),
        alignment=drift,
        score=score,
    )


def consistency() -> Kind:
    """Eight rare labels of 150 examples; noise should not change the answers to 1,000 others."""
    inputs, labels = make_multilabel_classification(
        4000, n_features=30, n_classes=8, n_labels=1, allow_unlabeled=True, random_state=0
    )
    inputs = jnp.asarray((inputs - inputs.mean(0)) / inputs.std(0), jnp.float32)
    labels = jnp.asarray(labels, jnp.float32)
    parts = slice(1000, 2000), slice(2000, 4000)

    def sample(params: Any, key: jax.Array) -> Any:
        for_few, for_many, for_noise = jax.random.split(key, 3)
        few = jax.random.randint(for_few, (64,), 0, 150)
        many = inputs[jax.random.randint(for_many, (64,), 0, 1000)]
        moved = many + 0.5 * jax.random.normal(for_noise, many.shape)
        return inputs[few], labels[few], many, moved

    def prediction(params: Any, found: Any, batch: Any) -> jax.Array:
        logits = networks.apply(params, batch[0])
        return jnp.mean(jax.nn.softplus(logits) - batch[1] * logits)

    def alignment(params: Any, found: Any, batch: Any) -> jax.Array:
        still, moved = (jax.nn.sigmoid(networks.apply(params, each)) for each in batch[2:])
        return jnp.mean((still - moved) ** 2)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        logits, wanted = networks.apply(params, inputs[parts[part]]), labels[parts[part]]
        # The share of pairs of an example with a label and one without that are in order.
        ranks = 1 + jnp.argsort(jnp.argsort(logits, axis=0), axis=0)
        with_it = jnp.sum(wanted, axis=0)
        in_order = jnp.sum(ranks * wanted, axis=0) - with_it * (with_it + 1) / 2
        return 100 * jnp.mean(in_order / (with_it * (len(wanted) - with_it)))

    return Kind(
        title="rare labels, consistency",
        losses=("labels of few examples", "change of the answers with noise"),
        measure="mean area under the curve, %",
        higher=True,
        init=lambda key: networks.init(key, 30, 64, 64, 8),
        sample=sample,
        features=lambda params, batch: None,
        prediction=prediction,
        alignment=alignment,
        score=score,
    )


def denoising() -> Kind:
    """Digits without their noise, learned from 200 pairs; their total variation should be small."""
    random = np.random.default_rng(0)
    pixels = load_digits().data[random.permutation(1797)] / 16
    noisy = jnp.asarray(pixels + 0.4 * random.normal(size=pixels.shape), jnp.float32)
    clean = jnp.asarray(pixels, jnp.float32)
    parts = slice(300, 800), slice(800, 1797)

    def sample(params: Any, key: jax.Array) -> Any:
        which = jax.random.randint(key, (64,), 0, 200)
        return noisy[which], clean[which]

    def variation(params: Any, found: Any, batch: Any) -> jax.Array:
        images = found.reshape(-1, 8, 8)
        return sum(jnp.mean(jnp.abs(jnp.diff(images, axis=axis))) for axis in (1, 2))

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        found, wanted = networks.apply(params, noisy[parts[part]]), clean[parts[part]]
        return 100 * jnp.mean((found - wanted) ** 2) / jnp.var(clean)

    return Kind(
        title="denoising, total variation",
        losses=("squared error", "total variation"),
        measure="squared error, %",
        higher=False,
        init=lambda key: networks.init(key, 64, 64, 64, 64),
        sample=sample,
        features=lambda params, batch: networks.apply(params, batch[0]),
        prediction=lambda params, found, batch: jnp.mean((found - batch[1]) ** 2),
        alignment=variation,
        score=score,
    )
