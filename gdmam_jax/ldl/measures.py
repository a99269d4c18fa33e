"""How far predicted label distributions are from true ones.

Every measure takes `(prediction, target)` of shape (samples, labels), rows summing to 1, and an
optional `weights` of shape (samples,), and returns the mean over the samples. Denominators and
logarithms are floored at 1e-14; gradients are finite everywhere.

The six measures are those of Geng, Label Distribution Learning, IEEE TKDE 2016; the distances over
head and tail labels are those of the imbalanced setting (Zhao et al., AAAI 2023).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gdmam_jax.ldl.losses import floor, kullback_leibler, weighted_mean


def _root(square: jax.Array) -> jax.Array:
    """Square root with gradient 0 instead of infinity at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def chebyshev(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Chebyshev distance, $\max_j |d_j - p_j|$; lower is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(chebyshev(jnp.array([[0.5, 0.5]]), jnp.array([[0.8, 0.2]]))), 4)
      0.3
    """
    return weighted_mean(jnp.abs(target - prediction).max(-1), weights)


def _relative(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return (target - prediction) / jnp.maximum(target + prediction, floor(target, prediction))


def clark(prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Clark distance, $\sqrt{\sum_j (d_j - p_j)^2 / (d_j + p_j)^2}$; lower is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(clark(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]))), 4)
      1.4142
    """
    return weighted_mean(_root(jnp.square(_relative(prediction, target)).sum(-1)), weights)


def canberra(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Canberra metric, $\sum_j |d_j - p_j| / (d_j + p_j)$; lower is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(canberra(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])))
      2.0
    """
    return weighted_mean(jnp.abs(_relative(prediction, target)).sum(-1), weights)


def cosine(prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""Cosine similarity, $\langle d, p \rangle / (|d| |p|)$; higher is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(cosine(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]]))), 4)
      0.7071
    """
    lengths = _root(jnp.square(prediction).sum(-1)) * _root(jnp.square(target).sum(-1))
    lengths = jnp.maximum(lengths, floor(lengths))
    return weighted_mean((prediction * target).sum(-1) / lengths, weights)


def intersection(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Intersection similarity, $\sum_j \min(d_j, p_j)$; higher is better.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(intersection(jnp.array([[0.5, 0.5]]), jnp.array([[0.8, 0.2]]))), 4)
      0.7
    """
    return weighted_mean(jnp.minimum(prediction, target).sum(-1), weights)


def euclidean(
    prediction: jax.Array,
    target: jax.Array,
    weights: jax.Array | None = None,
    *,
    labels: jax.Array | None = None,
) -> jax.Array:
    r"""Euclidean distance over some labels, $\sqrt{\sum_{j \in L} (d_j - p_j)^2}$; lower is better.

    Args:
      prediction: p, shape (samples, labels).
      target: d, the same shape.
      weights: shape (samples,), or None.
      labels: which labels count, shape (labels,), boolean; None counts all.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> prediction, target = jnp.array([[0.5, 0.5]]), jnp.array([[0.8, 0.2]])
      >>> round(float(euclidean(prediction, target, labels=jnp.array([True, False]))), 4)
      0.3
    """
    square = jnp.square(target - prediction)
    if labels is not None:
        square = jnp.where(labels, square, 0)
    return weighted_mean(_root(square.sum(-1)), weights)


MEASURES: dict[str, Callable[..., jax.Array]] = {
    "chebyshev": chebyshev,
    "clark": clark,
    "canberra": canberra,
    "kld": kullback_leibler,
    "cosine": cosine,
    "intersection": intersection,
}
"""The six measures by name, in the order in which papers print them."""

HIGHER_IS_BETTER = frozenset({"cosine", "intersection"})
"""The names of the measures that are similarities; all others are distances."""


def measure(
    prediction: jax.Array,
    target: jax.Array,
    weights: jax.Array | None = None,
    *,
    head: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """All six measures, and the Euclidean distance over all labels, the head and the tail.

    Args:
      prediction: shape (samples, labels), rows sum to 1.
      target: the same shape.
      weights: shape (samples,), or None.
      head: shape (labels,), boolean, True for head labels: see `imbalance.head_labels`. None
        leaves head and tail out.

    Returns:
      Scalars by name: those of `MEASURES`, `euclidean`, and with `head` also `euclidean_head`
      and `euclidean_tail`.

    Examples:
      >>> import jax.numpy as jnp
      >>> values = measure(jnp.array([[0.5, 0.5]]), jnp.array([[0.8, 0.2]]))
      >>> sorted(values)
      ['canberra', 'chebyshev', 'clark', 'cosine', 'euclidean', 'intersection', 'kld']
    """
    values = {name: function(prediction, target, weights) for name, function in MEASURES.items()}
    values["euclidean"] = euclidean(prediction, target, weights)
    if head is not None:
        values["euclidean_head"] = euclidean(prediction, target, weights, labels=head)
        values["euclidean_tail"] = euclidean(prediction, target, weights, labels=~head)
    return values
