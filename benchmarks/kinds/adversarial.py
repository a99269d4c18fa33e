"""A kind of problem with a discriminator, on scikit-learn's digits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.neural_network import MLPClassifier

from benchmarks.kinds import networks
from benchmarks.kinds.images import BATCH, digits
from benchmarks.kinds.kind import Kind, Opponent

TOKENS, CODES, WIDTH = 4, 16, 4
"""Parts of a code, words of the code book, and numbers in each word."""


def _quantise(book: jax.Array, found: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest words, which pass their gradient straight through, and the loss of both."""
    apart = jnp.sum((found[..., None, :] - book) ** 2, axis=-1)
    words = book[jnp.argmin(apart, axis=-1)]
    still = jax.lax.stop_gradient
    loss = jnp.sum((words - still(found)) ** 2 + 0.25 * (still(words) - found) ** 2, axis=(1, 2))
    return found + still(words - found), jnp.mean(loss)


def _decoded(params: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What comes out for images, and the loss of their words."""
    ((book, _),) = params["book"]
    found = networks.apply(params["encoder"], pixels).reshape(-1, TOKENS, WIDTH)
    words, loss = _quantise(book, found)
    decoded = networks.apply(params["decoder"], words.reshape(len(pixels), -1))
    return jax.nn.sigmoid(decoded), loss


def _frechet(one: jax.Array, other: jax.Array) -> jax.Array:
    """Between normal distributions with the means and covariances of two samples, ``(n, d)``."""
    covariances = [jnp.cov(each, rowvar=False) for each in (one, other)]
    values, vectors = jnp.linalg.eigh(covariances[0])
    root = (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T
    between = jnp.linalg.eigvalsh(root @ covariances[1] @ root)
    means = jnp.mean(one, axis=0) - jnp.mean(other, axis=0)
    spread = sum(map(jnp.trace, covariances)) - 2 * jnp.sum(jnp.sqrt(jnp.maximum(between, 0)))
    return jnp.sum(means**2) + spread


def _reader() -> networks.Layers:
    """The hidden layers of a network that reads digits; in place of Inception's in the measure."""
    training, _ = digits()
    found = MLPClassifier((32, 16), activation="tanh", max_iter=1000, random_state=0)
    found.fit(np.asarray(training.pixels), np.asarray(training.labels))
    layers = list(zip(found.coefs_, found.intercepts_, strict=True))[:-1]
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), layers)


def vq_gan() -> Kind:
    """An autoencoder of discrete words, judged by a discriminator (VQGAN)."""
    training, held_out = digits()
    reader = _reader()

    def judge(opponent: Any, pixels: jax.Array) -> jax.Array:
        return networks.apply(opponent, pixels)[:, 0]

    def reconstruction(params: Any, found: Any, given: Any) -> jax.Array:
        decoded, loss = found
        return jnp.mean(jnp.sum((decoded - given[0]) ** 2, axis=-1)) + loss

    def deceiving(params: Any, found: Any, given: Any) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-judge(given[1], found[0])))

    def telling(opponent: Any, params: Any, pixels: jax.Array) -> jax.Array:
        decoded = judge(opponent, _decoded(params, pixels)[0])
        return jnp.mean(jax.nn.softplus(-judge(opponent, pixels)) + jax.nn.softplus(decoded))

    def score(params: Any, key: jax.Array, part: int) -> jax.Array:
        pixels = held_out[part].pixels
        both = pixels, _decoded(params, pixels)[0]
        return _frechet(*(networks.apply(reader, each, last=True) for each in both))

    return Kind(
        title="VQ autoencoder with a discriminator",
        losses=("reconstruction and words", "deceiving the discriminator"),
        measure="Fréchet distance of reconstructions",
        higher=False,
        init=lambda key: networks.several(
            key,
            encoder=(64, 64, TOKENS * WIDTH),
            book=(CODES, WIDTH),
            decoder=(TOKENS * WIDTH, 64, 64),
        ),
        sample=lambda params, key: training.draw(key, BATCH).pixels,
        features=lambda params, given: _decoded(params, given[0]),
        prediction=reconstruction,
        alignment=deceiving,
        score=score,
        last=lambda params: params["decoder"][-1][0],
        opponent=Opponent(lambda key: networks.init(key, 64, 64, 1), telling),
    )
