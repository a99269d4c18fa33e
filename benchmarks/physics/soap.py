"""SOAP, Adam in the eigenbasis of Shampoo's statistics, with only what the benchmark needs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Sides = tuple[jax.Array, ...]
"""For a matrix, one square matrix for its rows and one for its columns; otherwise nothing."""


class Leaf(NamedTuple):
    """What SOAP remembers of one array.

    Attributes:
      momentum: running mean of the gradients.
      second: running mean of the squared gradients in the eigenbasis.
      statistics: running means of $G G^T$ and $G^T G$.
      bases: their eigenvectors, in columns.
    """

    momentum: jax.Array
    second: jax.Array
    statistics: Sides
    bases: Sides


class SoapState(NamedTuple):
    """How many steps there were, and what each array's past was: a list in `jax.tree` order."""

    count: jax.Array
    leaves: list[Leaf]


def scale_by_soap(
    b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8, every: int = 2
) -> optax.GradientTransformation:
    r"""Adam in the eigenbasis of Shampoo's statistics, for matrices; plain Adam for vectors.

    With $L$ and $R$ the running means of $G G^T$ and $G^T G$, and $Q_L$, $Q_R$ their eigenvectors,
    the second moment follows $(Q_L^T G Q_R)^2$, and the update is turned back. The first step only
    measures: its update is 0. The bases are renewed every few steps by one power iteration and a QR
    decomposition.

    Args:
      b1: decay of the momentum.
      b2: decay of the second moment and of the statistics.
      eps: added to the second moment's root.
      every: how many steps a basis lasts.

    Returns:
      A gradient transformation.

    References:
      Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, ICLR 2025.
    """

    def init(params: Any) -> SoapState:
        def start(leaf: jax.Array) -> Leaf:
            square = tuple(jnp.zeros((n, n), leaf.dtype) for n in _preconditioned(leaf))
            bases = tuple(jnp.eye(n, dtype=leaf.dtype) for n in _preconditioned(leaf))
            return Leaf(jnp.zeros_like(leaf), jnp.zeros_like(leaf), square, bases)

        return SoapState(
            jnp.zeros((), jnp.int32), [start(leaf) for leaf in jax.tree.leaves(params)]
        )

    def first(gradient: jax.Array, leaf: Leaf) -> tuple[jax.Array, Leaf]:
        statistics = tuple((1 - b2) * side for side in _sides(gradient))
        bases = tuple(jnp.linalg.eigh(side)[1][:, ::-1] for side in statistics)
        return jnp.zeros_like(gradient), leaf._replace(statistics=statistics, bases=bases)

    def later(gradient: jax.Array, leaf: Leaf, count: jax.Array) -> tuple[jax.Array, Leaf]:
        momentum = b1 * leaf.momentum + (1 - b1) * gradient
        second = b2 * leaf.second + (1 - b2) * _turned(gradient, leaf.bases) ** 2
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        scaled = correction * _turned(momentum, leaf.bases) / (jnp.sqrt(second) + eps)
        statistics = tuple(
            b2 * old + (1 - b2) * side
            for old, side in zip(leaf.statistics, _sides(gradient), strict=True)
        )
        second, bases = jax.lax.cond(
            count % every == 0, _renewed, lambda second, _, bases: (second, bases),
            second, statistics, leaf.bases,
        )  # fmt: skip
        update = _turned(scaled, tuple(basis.T for basis in leaf.bases))
        return update, Leaf(momentum, second, statistics, bases)

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        gradients, structure = jax.tree.flatten(updates)

        def begun() -> list[tuple[jax.Array, Leaf]]:
            return [first(*each) for each in zip(gradients, state.leaves, strict=True)]

        def gone_on() -> list[tuple[jax.Array, Leaf]]:
            count = state.count
            return [later(*each, count) for each in zip(gradients, state.leaves, strict=True)]

        found = jax.lax.cond(state.count == 0, begun, gone_on)
        stepped, leaves = zip(*found, strict=True)
        return structure.unflatten(stepped), SoapState(state.count + 1, list(leaves))

    return optax.GradientTransformation(init, update)


def _preconditioned(leaf: jax.Array) -> tuple[int, ...]:
    return leaf.shape if leaf.ndim == 2 else ()


def _sides(gradient: jax.Array) -> Sides:
    return (gradient @ gradient.T, gradient.T @ gradient) if gradient.ndim == 2 else ()


def _turned(leaf: jax.Array, bases: Sides) -> jax.Array:
    return bases[0].T @ leaf @ bases[1] if bases else leaf


def _renewed(second: jax.Array, statistics: Sides, bases: Sides) -> tuple[jax.Array, Sides]:
    """Each basis closer to the eigenvectors, the largest eigenvalue first."""
    renewed = []
    for axis, (side, basis) in enumerate(zip(statistics, bases, strict=True)):
        product = side @ basis
        order = jnp.argsort(-jnp.sum(basis * product, axis=0))
        second = jnp.take(second, order, axis=axis)
        renewed.append(jnp.linalg.qr(product[:, order])[0])
    return second, tuple(renewed)
