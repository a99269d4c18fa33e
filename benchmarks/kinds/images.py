"""Kinds of problems on scikit-learn's digits: images of 8 x 8 pixels."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier

from benchmarks.kinds import networks
from benchmarks.kinds.kind import Kind

BATCH = 64
TRAINING, VALIDATION = 1000, 300
"""Images; the other 497 are for testing."""


class Images(NamedTuple):
    """Pixels from 0 to 1, shape ``(n, 64)``, and labels, ``(n,)``."""

    pixels: jax.Array
    labels: jax.Array

    def take(self, which: Any) -> "Images":
        return Images(self.pixels[which], self.labels[which])

    def draw(self, key: jax.Array, count: int = BATCH) -> "Images":
        return self.take(jax.random.randint(key, (count,), 0, len(self.labels)))


@functools.cache
def digits() -> tuple[Images, tuple[Images, Images]]:
    """Images to train on, and those held out: for choosing, and for the report."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = jnp.asarray(data.data[order] / 16, jnp.float32)
    everything = Images(pixels, jnp.asarray(data.target[order], jnp.int32))
    end = TRAINING + VALIDATION
    held_out = everything.take(slice(TRAINING, end)), everything.take(slice(end, None))
    return everything.take(slice(0, TRAINING)), held_out


def vae(beta: float = 1.0) -> Kind:
    """Reconstruction and divergence from the prior: their sum is the objective."""
    training, held_out = digits()
    latent = 8

    def features(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        images, _ = batch
        mean, log_variance = jnp.split(networks.apply(params["encoder"], images.pixels), 2, axis=-1)
        return mean, log_variance

    def reconstruction(params: Any, found: Any, batch: Any) -> jax.Array:
        images, noise = batch
        mean, log_variance = found
        logits = networks.apply(params["decoder"], mean + jnp.exp(log_variance / 2) * noise)
        each = jax.nn.softplus(logits) - images.pixels * logits
        return jnp.mean(jnp.sum(each, axis=-1))

    def divergence(params: Any, found: Any, batch: Any) -> jax.Array:
        mean, log_variance = found
        each = mean**2 + jnp.exp(log_variance) - 1 - log_variance
        return beta * jnp.mean(jnp.sum(each, axis=-1)) / 2

    def sample(params: Any, key: jax.Array) -> Any:
        which, noise = jax.random.split(key)
        return training.draw(which), jax.random.normal(noise, (BATCH, latent))

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        images = held_out[part]
        noise = jax.random.normal(key, (len(images.labels), latent))
        batch = images, noise
        found = features(params, batch)
        return reconstruction(params, found, batch) + divergence(params, found, batch)

    return Kind(
        title="VAE" if beta == 1 else f"beta-VAE, beta = {beta:g}",
        losses=("reconstruction", "divergence from the prior"),
        measure="negative ELBO" if beta == 1 else f"reconstruction + {beta:g} x divergence",
        higher=False,
        init=lambda key: networks.several(key, encoder=(64, 64, 2 * latent), decoder=(8, 64, 64)),
        sample=sample,
        features=features,
        prediction=reconstruction,
        alignment=divergence,
        score=score,
    )


def _overlay(one: Images, other: Images) -> tuple[jax.Array, jax.Array, jax.Array]:
    first, second = (each.pixels.reshape(-1, 8, 8) for each in (one, other))
    first = jnp.pad(first, ((0, 0), (0, 2), (0, 2)))
    second = jnp.pad(second, ((0, 0), (2, 0), (2, 0)))
    return jnp.maximum(first, second).reshape(-1, 100), one.labels, other.labels


def pairs(images: Images, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Images of 10 x 10 pixels, one laid over another, and the labels of both."""
    return _overlay(*(images.draw(each, count) for each in jax.random.split(key)))


def shared_trunk() -> Kind:
    """Two digits over each other, as in Multi-MNIST: read both."""
    training, held_out = digits()

    def head(name: str, number: int) -> Any:
        return lambda params, found, batch: networks.cross_entropy(
            networks.apply(params[name], found), batch[number]
        )

    def features(params: Any, batch: Any) -> jax.Array:
        return networks.apply(params["trunk"], batch[0], last=True)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        # The same pairs for all.
        batch = pairs(held_out[part], jax.random.key(part), 2000)
        found = features(params, batch)
        each = [
            networks.accuracy(networks.apply(params[name], found), batch[number])
            for number, name in ((1, "first"), (2, "second"))
        ]
        return 100 * sum(each) / 2

    return Kind(
        title="two tasks, a shared trunk",
        losses=("the one digit", "the other, laid over it"),
        measure="mean accuracy of both, %",
        higher=True,
        init=lambda key: networks.several(
            key, trunk=(100, 64, 32), first=(32, 10), second=(32, 10)
        ),
        sample=lambda params, key: pairs(training, key, BATCH),
        features=features,
        prediction=head("first", 1),
        alignment=head("second", 2),
        score=score,
        trunk=True,
    )


def _classifier(key: jax.Array) -> Any:
    return networks.init(key, 64, 32, 10)


def _test_accuracy(params: Any, key: jax.Array, part: int) -> jax.Array:
    _, held_out = digits()
    logits = networks.apply(params, held_out[part].pixels)
    return 100 * networks.accuracy(logits, held_out[part].labels)


def distillation() -> Kind:
    """A few labels, and a teacher that saw more of them."""
    training, _ = digits()
    teacher = ExtraTreesClassifier(300, random_state=0).fit(training.pixels, training.labels)
    few, temperature = 200, 2.0
    mild = np.maximum(teacher.predict_proba(training.pixels), 1e-3) ** (1 / temperature)
    targets = jnp.asarray(mild / mild.sum(axis=1, keepdims=True), jnp.float32)

    def sample(params: Any, key: jax.Array) -> Any:
        labelled, others = jax.random.split(key)
        which = jax.random.randint(others, (BATCH,), 0, TRAINING)
        return training.take(slice(0, few)).draw(labelled), training.pixels[which], targets[which]

    def teaching(params: Any, _: Any, batch: Any) -> jax.Array:
        _, pixels, wanted = batch
        logits = networks.apply(params, pixels) / temperature
        return -(temperature**2) * jnp.mean(jnp.sum(wanted * jax.nn.log_softmax(logits), axis=-1))

    return Kind(
        title="distillation",
        losses=(f"{few} labels", "the teacher's probabilities"),
        measure="accuracy, %",
        higher=True,
        init=_classifier,
        sample=sample,
        features=lambda params, batch: (),
        prediction=lambda params, _, batch: networks.cross_entropy(
            networks.apply(params, batch[0].pixels), batch[0].labels
        ),
        alignment=teaching,
        score=_test_accuracy,
    )


def robustness() -> Kind:
    """Right answers, and the same answers for images that were tampered with (TRADES)."""
    training, held_out = digits()
    radius = 0.2

    def attack(loss: Any, pixels: jax.Array) -> jax.Array:
        """One step of the largest allowed size up the loss."""
        return pixels + radius * jnp.sign(jax.lax.stop_gradient(jax.grad(loss)(pixels)))

    def divergence(params: Any, batch: Any, moved: jax.Array) -> jax.Array:
        before, after = (
            jax.nn.log_softmax(networks.apply(params, x)) for x in (batch.pixels, moved)
        )
        return jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=-1))

    def sample(params: Any, key: jax.Array) -> Any:
        which, noise = jax.random.split(key)
        batch = training.draw(which)
        # The divergence has no slope at the image itself.
        start = batch.pixels + 0.01 * jax.random.normal(noise, batch.pixels.shape)
        return batch, attack(lambda moved: divergence(params, batch, moved), start)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        pixels, labels = held_out[part]
        loss = lambda pixels: networks.cross_entropy(networks.apply(params, pixels), labels)  # noqa: E731
        found = (networks.apply(params, x) for x in (pixels, attack(loss, pixels)))
        return 100 * sum(networks.accuracy(each, labels) for each in found) / 2

    return Kind(
        title="robustness penalty",
        losses=("cross-entropy", "divergence under attack (TRADES)"),
        measure="mean accuracy, clean and attacked, %",
        higher=True,
        init=_classifier,
        sample=sample,
        features=lambda params, batch: (),
        prediction=lambda params, _, batch: networks.cross_entropy(
            networks.apply(params, batch[0].pixels), batch[0].labels
        ),
        alignment=lambda params, _, batch: divergence(params, *batch),
        score=score,
    )


def contrastive() -> Kind:
    """A few labels, and representations that two views of an image share (SimCLR)."""
    training, held_out = digits()
    few, temperature = 100, 0.2

    def sample(params: Any, key: jax.Array) -> Any:
        labelled, others, *noise = jax.random.split(key, 4)
        pixels = training.draw(others).pixels
        views = [pixels + 0.2 * jax.random.normal(each, pixels.shape) for each in noise]
        return training.take(slice(0, few)).draw(labelled), jnp.concatenate(views)

    def features(params: Any, batch: Any) -> jax.Array:
        pixels = jnp.concatenate([batch[0].pixels, batch[1]])
        return networks.apply(params["trunk"], pixels, last=True)

    def contrast(params: Any, found: Any, batch: Any) -> jax.Array:
        z = networks.apply(params["projector"], found[BATCH:])
        z = z / jnp.linalg.norm(z, axis=-1, keepdims=True)
        count = len(z)
        logits = z @ z.T / temperature - 1e9 * jnp.eye(count)
        return networks.cross_entropy(logits, (jnp.arange(count) + count // 2) % count)

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        found = networks.apply(params["trunk"], held_out[part].pixels, last=True)
        return 100 * networks.accuracy(networks.apply(params["head"], found), held_out[part].labels)

    return Kind(
        title="contrastive auxiliary loss",
        losses=(f"{few} labels", "two views of an image agree (SimCLR)"),
        measure="accuracy, %",
        higher=True,
        init=lambda key: networks.several(
            key, trunk=(64, 64, 32), head=(32, 10), projector=(32, 16)
        ),
        sample=sample,
        features=features,
        prediction=lambda params, found, batch: networks.cross_entropy(
            networks.apply(params["head"], found[:BATCH]), batch[0].labels
        ),
        alignment=contrast,
        score=score,
        trunk=True,
    )
