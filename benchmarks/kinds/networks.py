"""Small networks of plain arrays."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Layers = list[tuple[jax.Array, jax.Array]]


def init(key: jax.Array, *sizes: int) -> Layers:
    """Kernels, normal with deviation one over the root of the inputs, and biases of 0."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(key, pair) / pair[0] ** 0.5, jnp.zeros(pair[1]))
        for key, pair in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def apply(layers: Layers, x: jax.Array, last: bool = False) -> jax.Array:
    """Layers with hyperbolic tangents between them; with ``last``, also after the last."""
    for number, (kernel, bias) in enumerate(layers):
        x = x @ kernel + bias
        if last or number < len(layers) - 1:
            x = jnp.tanh(x)
    return x


def several(key: jax.Array, **sizes: Sequence[int]) -> dict[str, Layers]:
    """Networks by name."""
    keys = jax.random.split(key, len(sizes))
    return {name: init(k, *size) for k, (name, size) in zip(keys, sizes.items(), strict=True)}


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the examples."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
    return -jnp.mean(chosen)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of examples whose label has the largest logit."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)
