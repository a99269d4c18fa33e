"""What is decided from the geometry: task weights, gate and momentum, each by a small function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._dataclass import pytree_dataclass
from gdmam_jax.geometry import EPS, Geometry, Scope, Scopes, floored_sqrt, measure
from gdmam_jax.pairs import GradientPair

COMPONENTS = ("prediction", "parallel", "orthogonal")
"""The three components of a step, in the order of every last axis of length 3."""


@pytree_dataclass
class NormStatistics:
    r"""Running statistics of the three components' norms.

    The last axis is (prediction, parallel, orthogonal); one row per scope where there are several.
    float32, or float64 where a parameter is. Mean and variance are bias-corrected, and updated as
    such: the difference of a mean square and a squared mean would cancel.

    Attributes:
      momentum: $\beta_k$ of the previous step; shape ``(3,)`` or ``(scopes, 3)``.
      mean: $\mu$, weighted mean of the norms so far; the same shape.
      variance: $s^2$, their weighted variance; the same shape.
      remainder: $r$, product of the statistics' decays so far, 1 at first; shape ``()``.
    """

    momentum: jax.Array
    mean: jax.Array
    variance: jax.Array
    remainder: jax.Array

    @property
    def deviation(self) -> jax.Array:
        r"""The released spread of the norm, of statistics that start at 0 without bias correction.

        $\sigma^2 = square - mean^2 = (1 - r) (s^2 + r \mu^2)$: as if norms of 0 had come before.
        """
        r = self.remainder
        return floored_sqrt((1 - r) * (self.variance + r * self.mean**2))


Weighting = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
Gate = Callable[[jax.Array], tuple[Any, Any]]
MomentumRule = Callable[[NormStatistics, Any, tuple[Any, Any, Any]], jax.Array]


def norm_weighting(
    prediction_norm: jax.Array, alignment_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Each task weighs as much as its gradient: $w_k = n_k / (n_p + n_a)$. The reference.

    Args:
      prediction_norm: $n_p$, shape ``()`` or ``(scopes,)``.
      alignment_norm: $n_a$, the same shape.

    Returns:
      ``(prediction_weight, alignment_weight)``, the same shape, adding up to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(weight) for weight in norm_weighting(jnp.array(3.0), jnp.array(1.0))]
      [0.75, 0.25]

    References:
      The weights of the released GDMAM code.
    """
    total = prediction_norm + alignment_norm
    return prediction_norm / total, alignment_norm / total


def balanced_weighting(
    prediction_norm: jax.Array, alignment_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""Both weighted gradients get one norm: $w_p = n_a / (n_p + n_a)$, $w_a$ the rest.

    A task without a gradient has no norm to match, and leaves the other one its full weight.

    Args:
      prediction_norm: $n_p$, shape ``()`` or ``(scopes,)``.
      alignment_norm: $n_a$, the same shape.

    Returns:
      ``(prediction_weight, alignment_weight)``, the same shape, adding up to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(weight) for weight in balanced_weighting(jnp.array(3.0), jnp.array(1.0))]
      [0.25, 0.75]

    References:
      A choice of this library, not of the released code.
    """
    weights = norm_weighting(alignment_norm, prediction_norm)
    alone = (prediction_norm <= EPS) | (alignment_norm <= EPS)
    only_prediction = (alignment_norm <= EPS).astype(prediction_norm.dtype)
    return (
        jnp.where(alone, only_prediction, weights[0]),
        jnp.where(alone, 1 - only_prediction, weights[1]),
    )


def constant_weighting(prediction: float, alignment: float) -> Weighting:
    """Weights that do not depend on the gradients.

    Args:
      prediction: the prediction task's weight.
      alignment: the alignment task's weight.

    Returns:
      A weighting: a function of the two norms.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(w) for w in constant_weighting(1.0, 0.5)(jnp.array(3.0), jnp.array(1.0))]
      [1.0, 0.5]
    """

    def weighting(prediction_norm: jax.Array, alignment_norm: jax.Array) -> tuple[Any, Any]:
        return jnp.full_like(prediction_norm, prediction), jnp.full_like(alignment_norm, alignment)

    return weighting


def cosine_gate(cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The better the tasks agree, the more of the parallel part: ``(gate, 1 - gate)``. Reference.

    $$gate = clip(\cos(g_a, g_p), 0, 1)$$

    Args:
      cosine: of the angle between the two gradients, shape ``()`` or ``(scopes,)``.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in cosine_gate(jnp.array(0.25))]
      [0.25, 0.75]

    References:
      The gate of the released GDMAM code.
    """
    gate = jnp.clip(cosine, 0, 1)
    return gate, 1 - gate


def conflict_gate(cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drops the parallel part where it opposes the prediction gradient, and nothing else.

    For two losses and no momentum the alignment gradient then is projected as PCGrad projects it.

    Args:
      cosine: of the angle between the two gradients, shape ``()`` or ``(scopes,)``.

    Returns:
      ``(1 if cosine > 0 else 0, 1)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in conflict_gate(jnp.array(-0.25))]
      [0.0, 1.0]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, 2020.
    """
    return (cosine > 0).astype(cosine.dtype), jnp.ones_like(cosine)


def open_gate(cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lets both parts through: ``(1, 1)``.

    Args:
      cosine: of the angle between the two gradients, shape ``()`` or ``(scopes,)``.

    Returns:
      Two ones of its shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in open_gate(jnp.array(-0.25))]
      [1.0, 1.0]
    """
    return jnp.ones_like(cosine), jnp.ones_like(cosine)


def _filled(sensitivity: Sequence[Any], default: Sequence[float], like: jax.Array) -> jax.Array:
    chosen = [d if s is None else s for s, d in zip(sensitivity, default, strict=True)]
    return jnp.stack([jnp.asarray(value, like.dtype) for value in chosen])


def ratcheted_momentum(
    statistics: NormStatistics, initial: Any, sensitivity: tuple[Any, Any, Any]
) -> jax.Array:
    r"""Momentum that only ever falls: $\beta_k - \kappa_k \sigma_k$. The reference.

    The statistics start at 0 and are not bias-corrected, so the first steps pull it down hard.

    Args:
      statistics: see `NormStatistics`; ``momentum`` is the previous step's.
      initial: unused; the momentum starts there.
      sensitivity: $\kappa$ of the three components; None stands for 0.05, 0.1, 0.1.

    Returns:
      The three momentum coefficients before clipping, of the statistics' shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.95), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.array(0.0))
      >>> [round(float(momentum), 3) for momentum in ratcheted_momentum(seen, 0.95, (None,) * 3)]
      [0.93, 0.91, 0.91]

    References:
      The momentum rule of the released GDMAM code.
    """
    kappa = _filled(sensitivity, (0.05, 0.1, 0.1), statistics.mean)
    return statistics.momentum - kappa * statistics.deviation


def anchored_momentum(
    statistics: NormStatistics, initial: Any, sensitivity: tuple[Any, Any, Any]
) -> jax.Array:
    r"""Momentum that recovers when the noise subsides: $\beta_0 - \kappa_k \sigma_k$.

    Args:
      statistics: see `NormStatistics`.
      initial: $\beta_0$.
      sensitivity: $\kappa$ of the three components; None stands for 0.05, 0.1, 0.1.

    Returns:
      The three momentum coefficients before clipping, of the statistics' shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.array(0.0))
      >>> [round(float(momentum), 3) for momentum in anchored_momentum(seen, 0.95, (None,) * 3)]
      [0.93, 0.91, 0.91]
    """
    kappa = _filled(sensitivity, (0.05, 0.1, 0.1), statistics.mean)
    return initial - kappa * statistics.deviation


def relative_momentum(
    statistics: NormStatistics, initial: Any, sensitivity: tuple[Any, Any, Any]
) -> jax.Array:
    r"""Momentum from the relative noise: $\beta_0 - \kappa_k \hat\sigma_k / \hat{mean}_k$.

    With bias-corrected statistics. It does not change when a loss is rescaled.

    Args:
      statistics: see `NormStatistics`.
      initial: $\beta_0$.
      sensitivity: $\kappa$ of the three components; None stands for 0.25 each.

    Returns:
      The three momentum coefficients before clipping, of the statistics' shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.01), remainder=jnp.array(0.0))
      >>> [round(float(momentum), 3) for momentum in relative_momentum(seen, 0.95, (None,) * 3)]
      [0.867, 0.867, 0.867]
    """
    kappa = _filled(sensitivity, (0.25, 0.25, 0.25), statistics.mean)
    noise = floored_sqrt(statistics.variance) / jnp.where(statistics.mean > 0, statistics.mean, EPS)
    return initial - kappa * noise


@pytree_dataclass
class Allocation:
    """What one step decided, kept in the optimizer state for the next step and for `diagnostics`.

    Attributes:
      statistics: the norms' running statistics, and the step's momentum; see `NormStatistics`.
      geometry: the step's scalars, zeros before the first; see `Geometry`.
      weights: (prediction, alignment) weight; shape ``(2,)`` or ``(scopes, 2)``.
      gate: factors of the (parallel, orthogonal) part; the same shape.
      scopes: the names of the scopes; static.
    """

    statistics: NormStatistics
    geometry: Geometry
    weights: jax.Array
    gate: jax.Array
    scopes: Scopes


def init_allocation(params: Any, scope: Scope | None, initial_momentum: Any) -> Allocation:
    """The allocation before the first step."""
    scopes = Scopes.of(params, scope)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))

    def zeros(*last: int) -> jax.Array:
        return jnp.zeros(scopes.shape + last, dtype)

    return Allocation(
        statistics=NormStatistics(
            momentum=jnp.full((*scopes.shape, 3), initial_momentum, dtype),
            mean=zeros(3),
            variance=zeros(3),
            remainder=jnp.ones((), dtype),
        ),
        geometry=Geometry(
            prediction_norm=zeros(),
            alignment_norm=zeros(),
            parallel_norm=zeros(),
            orthogonal_norm=zeros(),
            projection=zeros(),
            cosine=zeros(),
        ),
        weights=zeros(2),
        gate=zeros(2),
        scopes=scopes,
    )


def allocate(
    leaves: Sequence[GradientPair],
    previous: Allocation,
    *,
    weighting: Weighting,
    gate: Gate,
    momentum: MomentumRule,
    initial_momentum: Any,
    minimum_momentum: Any,
    maximum_momentum: Any,
    sensitivity: tuple[Any, Any, Any],
    statistics_decay: Any,
    axis_name: str | Sequence[str] | None,
) -> Allocation:
    """Measures the pairs and decides weights, gate and momentum for this step."""
    dtype = previous.weights.dtype
    geometry: Geometry = jax.tree.map(
        lambda scalar: scalar.astype(dtype), measure(leaves, previous.scopes, axis_name)
    )
    norms = jnp.stack([getattr(geometry, f"{name}_norm") for name in COMPONENTS], axis=-1)
    # A norm whose square would overflow counts as the largest one whose square does not.
    norms = jnp.minimum(norms, float(jnp.finfo(dtype).max) ** 0.5 / 2)

    old = previous.statistics
    remainder = statistics_decay * old.remainder
    # The newest norm's share of the mean: at the first step all of it, to the last bit.
    share = jnp.where(old.remainder == 1, 1, (1 - statistics_decay) / (1 - remainder))
    change = norms - old.mean
    statistics = NormStatistics(
        momentum=old.momentum,
        mean=(old.mean + share * change).astype(dtype),
        variance=((1 - share) * (old.variance + share * change**2)).astype(dtype),
        remainder=remainder.astype(dtype),
    )
    # What users bring may return plain numbers, the same for all scopes.
    coefficients = jnp.broadcast_to(
        momentum(statistics, initial_momentum, sensitivity), norms.shape
    )
    coefficients = jnp.clip(coefficients, minimum_momentum, maximum_momentum)

    def pair_of(factors: tuple[Any, Any]) -> jax.Array:
        shape = geometry.cosine.shape
        return jnp.stack([jnp.broadcast_to(f, shape) for f in factors], axis=-1).astype(dtype)

    return Allocation(
        statistics=dataclasses.replace(statistics, momentum=coefficients.astype(dtype)),
        geometry=geometry,
        weights=pair_of(weighting(geometry.prediction_norm, geometry.alignment_norm)),
        gate=pair_of(gate(geometry.cosine)),
        scopes=previous.scopes,
    )
