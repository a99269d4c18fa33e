"""Losses between label distributions, and between the Gaussian representations RDA aligns.

Distribution losses take `(prediction, target)`, both of shape (samples, labels) with rows that
sum to 1; the distribution-balanced family takes logits. Every loss is a mean over samples, or the
weighted mean where `weights` of shape (samples,) is given: a weight of 0 drops a row of padding,
whose content then has no effect as long as it is finite. All gradients are finite at labels and
predictions of exactly 0 and 1.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

FLOOR = 1e-14
"""Where denominators and arguments of logarithms are cut off, as in the released code."""

Reweighting = Literal["none", "inverse", "sqrt_inverse", "class_balanced", "rebalanced"]


def floor(*arrays: jax.Array) -> float:
    """`FLOOR`, or the smallest normal number of their dtype where that is larger, as in float16.

    Examples:
      >>> import jax.numpy as jnp
      >>> floor(jnp.ones(2)), floor(jnp.ones(2, jnp.float16)) > 0
      (1e-14, True)
    """
    return max(FLOOR, float(jnp.finfo(jnp.result_type(*arrays, float)).tiny))


def weighted_mean(values: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """Mean of `values` over its one axis, weighted by `weights` if given.

    Args:
      values: shape (samples,).
      weights: shape (samples,), not negative; None weighs all alike. All zero gives 0.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(weighted_mean(jnp.array([1.0, 3.0, 7.0]), jnp.array([1.0, 1.0, 0.0])))
      2.0
    """
    if weights is None:
        return values.mean()
    values = values.astype(jnp.result_type(values, float))  # else weights of integers are cut off
    weights = weights.astype(values.dtype)
    total = weights.sum()
    return jnp.where(total > 0, (weights * values).sum() / jnp.where(total > 0, total, 1), 0)


def _log_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    least = floor(numerator, denominator)
    return jnp.log(jnp.maximum(numerator / jnp.maximum(denominator, least), least))


def kullback_leibler(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Kullback-Leibler divergence of the prediction from the target.

    $\frac1n \sum_i \sum_j y_{ij} \log(y_{ij} / p_{ij})$, both denominator and ratio floored at
    1e-14.

    Args:
      prediction: p, shape (samples, labels), rows sum to 1.
      target: y, the same shape.
      weights: shape (samples,), or None.

    Returns:
      A scalar, in nats.

    Examples:
      >>> import jax.numpy as jnp
      >>> half, sure = jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])
      >>> round(float(kullback_leibler(half, sure)), 4)  # log 2
      0.6931

    References:
      Kullback and Leibler, On Information and Sufficiency, 1951.
    """
    return weighted_mean((target * _log_ratio(target, prediction)).sum(-1), weights)


def jensen_shannon(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Jensen-Shannon divergence, symmetric and at most log 2.

    $\frac12 \mathrm{KL}(y \| m) + \frac12 \mathrm{KL}(p \| m)$ with $m = (p + y) / 2$.

    Args:
      prediction: p, shape (samples, labels), rows sum to 1.
      target: y, the same shape.
      weights: shape (samples,), or None.

    Returns:
      A scalar, in nats.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(jensen_shannon(jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]]))), 4)
      0.6931

    References:
      Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    middle = (prediction + target) / 2
    divergences = target * _log_ratio(target, middle) + prediction * _log_ratio(prediction, middle)
    return weighted_mean(divergences.sum(-1) / 2, weights)


def squared(
    prediction: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Squared Euclidean distance, $\frac1n \sum_i \sum_j (p_{ij} - y_{ij})^2$.

    Args:
      prediction: p, shape (samples, labels).
      target: y, the same shape.
      weights: shape (samples,), or None.

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(squared(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])))
      0.5
    """
    return weighted_mean(jnp.square(prediction - target).sum(-1), weights)


def class_frequency(target: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    r"""How much of each label a training set holds, $f_j = \sum_i y_{ij}$, zeros replaced by 1.

    Args:
      target: y, shape (samples, labels).
      weights: shape (samples,), 0 for rows of padding; None counts all.

    Returns:
      Shape (labels,).

    Examples:
      >>> import jax.numpy as jnp
      >>> class_frequency(jnp.array([[0.75, 0.25, 0.0], [0.5, 0.5, 0.0]])).tolist()
      [1.25, 0.75, 1.0]
    """
    frequency = target.sum(0) if weights is None else (target * weights[:, None]).sum(0)
    return jnp.where(frequency > 0, frequency, 1)


def distribution_balanced(
    logits: jax.Array,
    target: jax.Array,
    frequency: jax.Array,
    num_samples: jax.typing.ArrayLike,
    weights: jax.Array | None = None,
    *,
    reweighting: Reweighting = "rebalanced",
    focal_gamma: float = 2.0,
    logit_bias: float = 0.05,
    negative_scale: float = 2.0,
    map_alpha: float = 0.1,
    map_beta: float = 10.0,
    map_gamma: float = 0.9,
    class_balanced_beta: float = 0.9,
) -> jax.Array:
    r"""The distribution-balanced focal loss for label distributions, and its family.

    With class frequencies $f$ of a training set of $N$ samples, logits $z$, target $y$:

    $$z_j \leftarrow z_j - b \log(N / f_j - 1), \quad
      z_j \leftarrow y_j z_j + (1 - y_j)\, s z_j, \quad
      w_j \leftarrow y_j w_j + (1 - y_j)\, w_j / s, \quad p = \mathrm{softmax}(z)$$

    $$\frac1{nc} \sum_{ij} (1 - p_{ij})^\gamma w_{ij}\, y_{ij} \log(y_{ij} / p_{ij})$$

    The reweightings, $w_j$ before the step with $s$:

    - ``none``: 1
    - ``inverse``: $1 / f_j$, ``sqrt_inverse``: $1 / \sqrt{f_j}$, and ``class_balanced``:
      $(1 - \beta) / (1 - \beta^{f_j})$, the inverse effective number; all three divided by their
      mean over the labels, so that one learning rate serves them all
    - ``rebalanced``: $\mathrm{sigmoid}(\beta_m (r_j - \gamma_m)) + \alpha_m$ with
      $r_j = (1 / f_j) / \sum_k y_k / f_k$

    Args:
      logits: z, shape (samples, labels).
      target: y, the same shape, rows sum to 1.
      frequency: f, shape (labels,), of the whole training set: see `class_frequency`.
      num_samples: N, the training set's size.
      weights: shape (samples,), or None.
      reweighting: which of the above.
      focal_gamma: $\gamma$; 0 leaves the focal factor out.
      logit_bias: b; 0 leaves the shift out.
      negative_scale: s; 1 leaves the scaling out.
      map_alpha: $\alpha_m$.
      map_beta: $\beta_m$.
      map_gamma: $\gamma_m$.
      class_balanced_beta: $\beta$ of ``class_balanced``.

    Returns:
      A scalar.

    Raises:
      ValueError: for an unknown reweighting, or a focal_gamma between 0 and 1, where the
        gradient at a prediction of 1 would be infinite.

    Examples:
      >>> import jax.numpy as jnp
      >>> target = jnp.array([[0.75, 0.25], [0.5, 0.5]])
      >>> loss = distribution_balanced(jnp.zeros((2, 2)), target, class_frequency(target), 2)
      >>> round(float(loss), 5)
      0.00019

    References:
      Wu et al., Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
      Datasets, ECCV 2020; Cui et al., Class-Balanced Loss Based on Effective Number of Samples,
      CVPR 2019; Zhao et al., Imbalanced Label Distribution Learning, AAAI 2023.
    """
    if focal_gamma != 0 and focal_gamma < 1:
        raise ValueError(f"focal_gamma must be 0 or at least 1, got {focal_gamma}")
    if reweighting == "rebalanced":
        inverse = 1 / frequency
        rates = inverse / (target * inverse).sum(-1, keepdims=True)
        class_weights = jax.nn.sigmoid(map_beta * (rates - map_gamma)) + map_alpha
    else:
        per_class = _per_class(reweighting, frequency, class_balanced_beta)
        class_weights = jnp.broadcast_to(per_class / per_class.mean(), target.shape)
    odds = jnp.maximum(num_samples / frequency - 1, floor(frequency))
    logits = logits - logit_bias * jnp.log(odds)
    logits = target * logits + (1 - target) * negative_scale * logits
    class_weights = target * class_weights + (1 - target) * class_weights / negative_scale
    prediction = jax.nn.softmax(logits)
    focal = (1 - prediction) ** focal_gamma if focal_gamma else 1.0
    terms = focal * class_weights * target * _log_ratio(target, prediction)
    return weighted_mean(terms.mean(-1), weights)


def _per_class(reweighting: str, frequency: jax.Array, beta: float) -> jax.Array:
    if reweighting == "none":
        return jnp.ones_like(frequency)
    if reweighting == "inverse":
        return 1 / frequency
    if reweighting == "sqrt_inverse":
        return jax.lax.rsqrt(frequency)
    if reweighting == "class_balanced":
        # 1 - beta^f would cancel where a label is rare, and be 0 at last.
        return (1 - beta) / -jnp.expm1(frequency * jnp.log1p(beta - 1))
    raise ValueError(
        f"unknown reweighting {reweighting!r}; expected none, inverse, sqrt_inverse, "
        "class_balanced or rebalanced"
    )


focal_loss = partial(distribution_balanced, reweighting="none", logit_bias=0.0, negative_scale=1.0)
"""OFR-FL's loss: the focal factor alone."""

class_balanced_loss = partial(
    distribution_balanced, reweighting="class_balanced", logit_bias=0.0, negative_scale=1.0
)
"""OFR-CB's loss: the focal factor and weights by effective number."""


def cross_entropy(
    logits: jax.Array, target: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    r"""Cross entropy of softmax(logits) against a distribution, $-\sum_j y_j \log p_j$.

    Args:
      logits: shape (samples, labels).
      target: y, the same shape, rows sum to 1.
      weights: shape (samples,), or None.

    Returns:
      A scalar, in nats.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(cross_entropy(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))), 4)
      0.6931
    """
    return weighted_mean(-(target * jax.nn.log_softmax(logits)).sum(-1), weights)


def bounded(log_variance: jax.Array, bound: float | None) -> jax.Array:
    r"""A log-variance softly bounded to $(-b, b)$ by $b \tanh(v / b)$; unchanged if b is None.

    At 0 this is the identity to first order, so a model at initialisation is as without it. Neither
    $e^{b \tanh(v / b)}$ nor its gradient overflows, whatever v is.

    Args:
      log_variance: v, any shape.
      bound: b > 0, or None.

    Returns:
      The same shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> bounded(jnp.array([0.0, 1e6]), 8.0).tolist()
      [0.0, 8.0]
    """
    return log_variance if bound is None else bound * jnp.tanh(log_variance / bound)


def gaussian_kullback_leibler(
    mean: jax.Array,
    log_variance: jax.Array,
    target_mean: jax.Array,
    target_log_variance: jax.Array,
    weights: jax.Array | None = None,
) -> jax.Array:
    r"""KL divergence of diagonal Gaussians, $\mathrm{KL}(N(\mu, e^v) \| N(\mu_t, e^{v_t}))$.

    $\frac12 \sum_k v_{t} - v + e^{v - v_t} + (\mu - \mu_t)^2 e^{-v_t} - 1$. Overflows where
    $v - v_t$ or $-v_t$ exceeds the logarithm of the largest number: bound them by `bounded`.

    Args:
      mean: $\mu$, shape (samples, hidden).
      log_variance: v, the same shape.
      target_mean: $\mu_t$, the same shape.
      target_log_variance: $v_t$, the same shape.
      weights: shape (samples,), or None.

    Returns:
      A scalar, in nats: summed over the hidden units, mean over the samples.

    Examples:
      >>> import jax.numpy as jnp
      >>> zeros = jnp.zeros((3, 4))
      >>> float(gaussian_kullback_leibler(zeros + 1, zeros, zeros, zeros))
      2.0
    """
    difference = log_variance - target_log_variance
    terms = (
        jnp.exp(difference)
        - difference
        + jnp.square(mean - target_mean) * jnp.exp(-target_log_variance)
        - 1
    )
    return weighted_mean(terms.sum(-1) / 2, weights)


def similarity_difference(
    left: jax.Array,
    right: jax.Array,
    weights: jax.Array | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
) -> jax.Array:
    r"""How differently two representations arrange the same samples.

    $\sum_{ij} (\cos(l_i, l_j) - \cos(r_i, r_j))^2$, or its mean over the $n^2$ pairs of samples.

    Args:
      left: l, shape (samples, hidden).
      right: r, shape (samples, hidden).
      weights: shape (samples,), 1 for rows that count and 0 for padding, or None.
      reduction: ``mean`` (RDA) or ``sum`` (the released GDMAM code).

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> left, right = jnp.eye(2), jnp.ones((2, 2))
      >>> round(float(similarity_difference(left, right)), 4)
      0.5
      >>> round(float(similarity_difference(left, right, reduction="sum")), 4)
      2.0
    """

    def directions(rows: jax.Array) -> jax.Array:
        square = jnp.square(rows).sum(-1, keepdims=True)
        return rows * jax.lax.rsqrt(jnp.maximum(square, 1e-16))

    left, right = directions(left), directions(right)
    differences = jnp.square(left @ left.T - right @ right.T)
    if weights is not None:
        differences = differences * (weights[:, None] * weights[None, :]).astype(left.dtype)
    total = differences.sum()
    if reduction == "sum":
        return total
    if reduction != "mean":
        raise ValueError(f"unknown reduction {reduction!r}; expected mean or sum")
    count = left.shape[0] ** 2 if weights is None else jnp.maximum(weights.sum() ** 2, 1)
    return total / count
