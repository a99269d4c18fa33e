"""Momentum rules: how long a step remembers, from the noise of the components' norms."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._checks import check_ordered, check_range
from gdmam_jax._numerics import divide, floored_sqrt, pytree_dataclass
from gdmam_jax._settings import with_settings

COMPONENTS = ("prediction", "parallel", "orthogonal")
"""The components of a step; the last two once for each alignment loss."""


@pytree_dataclass
class NormStatistics:
    r"""Running statistics of the norms of the allocated components.

    The last axis is (prediction, parallel, orthogonal), with the last two once for each alignment
    loss; with several scopes there is a row for each. float32, or float64 if a parameter is. Mean
    and variance are bias-corrected, and updated as such: the difference between a mean square and a
    squared mean would lose digits.

    Attributes:
      momentum: $\beta_k$ of the previous step, 1 before the first; shape ``(3,)`` or
        ``(scopes, 3)``.
      mean: $\mu$, weighted mean of the norms so far; the same shape.
      variance: $s^2$, their weighted variance; the same shape.
      remainder: $r$, product of the statistics' decays so far, 1 at first; shape ``(3,)``.
    """

    momentum: jax.Array
    mean: jax.Array
    variance: jax.Array
    remainder: jax.Array

    @classmethod
    def start(cls, shape: tuple[int, ...], dtype: Any) -> "NormStatistics":
        """The statistics before the first step."""
        zeros = jnp.zeros(shape, dtype)
        return cls(
            momentum=jnp.ones(shape, dtype),
            mean=zeros,
            variance=jnp.zeros_like(zeros),
            remainder=jnp.ones(shape[-1], dtype),
        )

    def after(self, sizes: jax.Array, decay: Any, present: Any = None) -> "NormStatistics":
        """The statistics after a step with components of these norms, for those present."""
        share, remainder = newest_share(self.remainder, decay, present)
        share = jnp.broadcast_to(share, self.mean.shape)
        change = sizes - self.mean
        return NormStatistics(
            momentum=self.momentum,
            mean=self.mean + share * change,
            variance=(1 - share) * (self.variance + share * change**2),
            remainder=remainder,
        )

    @property
    def deviation(self) -> jax.Array:
        r"""The released form's spread of the norm: its statistics start at 0, not bias-corrected.

        $\sigma^2 = \operatorname{square} - \operatorname{mean}^2 = (1 - r) (s^2 + r \mu^2)$: as if
        norms of 0 had come before.
        """
        r = jnp.broadcast_to(self.remainder, self.mean.shape)
        return floored_sqrt((1 - r) * (self.variance + r * self.mean**2))


def newest_share(remainder: jax.Array, decay: Any, present: Any) -> tuple[jax.Array, jax.Array]:
    """The newest value's share of a bias-corrected running mean, and what remains of the start.

    Where ``present`` is false the share is 0.
    """
    decay = jnp.asarray(decay, remainder.dtype)
    left = decay * remainder
    # At the first step the share is 1, to the last bit.
    share = jnp.where(remainder == 1, 1, (1 - decay) / jnp.where(left == 1, 1, 1 - left))
    if present is None:
        return share, left
    return jnp.where(present, share, 0), jnp.where(present, left, remainder)


MomentumRule = Callable[[NormStatistics], Any]
"""A function ``statistics -> momentum``: the components' coefficients, in [0, 1)."""


def _check(initial: Any, sensitivity: Any = 0.0, minimum: Any = 0.0, maximum: Any = 0.999) -> None:
    for name, value in (("initial", initial), ("minimum", minimum), ("maximum", maximum)):
        check_range(name, value, 0, 1, below_maximum=True)
    check_ordered("minimum", minimum, "maximum", maximum)
    for value in _three(sensitivity):
        check_range("sensitivity", value)


def _three(sensitivity: Any) -> tuple[Any, ...]:
    """The sensitivities of (prediction, parallel, orthogonal)."""
    if isinstance(sensitivity, Mapping):
        if {*sensitivity} != {*COMPONENTS}:
            raise ValueError(
                f"sensitivity must name {', '.join(COMPONENTS)}, got {', '.join(sensitivity)}"
            )
        return tuple(sensitivity[name] for name in COMPONENTS)
    several = isinstance(sensitivity, tuple | list) or getattr(sensitivity, "ndim", 0) == 1
    if several and len(sensitivity) != 3:
        raise ValueError(
            f"sensitivity must be a number or three, for {', '.join(COMPONENTS)}, got "
            f"{len(sensitivity)}"
        )
    return tuple(sensitivity) if several else (sensitivity,) * 3


def _lowered(
    start: Any, noise: jax.Array, initial: Any, sensitivity: Any, minimum: Any, maximum: Any
) -> jax.Array:
    """``start`` lowered by the noise of each component, between the bounds."""
    prediction, *others = [jnp.asarray(value, noise.dtype) for value in _three(sensitivity)]
    losses = (noise.shape[-1] - 1) // 2
    kappa = jnp.stack([prediction, *(other for other in others for _ in range(losses))])
    # A start below the minimum stays there.
    low = jnp.minimum(jnp.asarray(minimum, noise.dtype), jnp.asarray(initial, noise.dtype))
    lowered = jnp.asarray(start, noise.dtype) - jnp.broadcast_to(kappa, noise.shape) * noise
    return jnp.clip(lowered, low, jnp.asarray(maximum, noise.dtype))


_rule = functools.partial(with_settings, check=_check)


@_rule
def constant_momentum(statistics: NormStatistics, *, initial: Any = 0.95) -> jax.Array:
    r"""One momentum for all components and steps: $\beta_k = \beta_0$.

    Args:
      statistics: only its shape is used.
      initial: $\beta_0$, in [0, 1). To schedule it, give `optax.inject_hyperparams` a function of
        it: ``lambda initial: gdmam(1e-3, momentum=constant_momentum(initial=initial))``.

    Returns:
      The momentum coefficients, of the statistics' shape.

    Raises:
      ValueError: a setting is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.zeros(3))
      >>> [round(float(momentum), 3) for momentum in constant_momentum(initial=0.9)(seen)]
      [0.9, 0.9, 0.9]
    """
    return jnp.full_like(statistics.mean, initial)


@_rule
def ratcheted_momentum(
    statistics: NormStatistics,
    *,
    initial: Any = 0.95,
    sensitivity: Any = (0.05, 0.1, 0.1),
    minimum: Any = 0.7,
    maximum: Any = 0.999,
) -> jax.Array:
    r"""Momentum that only ever falls: $\beta_k - \kappa_k \sigma_k$. As released.

    The statistics start at 0 and are not bias-corrected, so the first steps lower the momentum a
    lot.

    Args:
      statistics: see `NormStatistics`; ``momentum`` is the previous step's.
      initial: $\beta_k$ before the first step, in [0, 1).
      sensitivity: $\kappa$, at least 0: how strongly noise lowers the momentum. A number, or one
        for each of (prediction, parallel, orthogonal), or a mapping by these names.
      minimum: lower bound of $\beta_k$ where the noise lowers it, in [0, 1).
      maximum: upper bound of $\beta_k$, in [0, 1).

    Returns:
      The momentum coefficients, of the statistics' shape.

    Raises:
      ValueError: a setting is out of range, or the bounds are the wrong way round.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.95), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.zeros(3))
      >>> [round(float(momentum), 3) for momentum in ratcheted_momentum(seen)]
      [0.93, 0.91, 0.91]

    References:
      The momentum rule of the released GDMAM code.
    """
    start = jnp.minimum(statistics.momentum, jnp.asarray(initial, statistics.mean.dtype))
    return _lowered(start, statistics.deviation, initial, sensitivity, minimum, maximum)


@_rule
def anchored_momentum(
    statistics: NormStatistics,
    *,
    initial: Any = 0.95,
    sensitivity: Any = (0.05, 0.1, 0.1),
    minimum: Any = 0.7,
    maximum: Any = 0.999,
) -> jax.Array:
    r"""Momentum that recovers when the noise subsides: $\beta_0 - \kappa_k \sigma_k$.

    Args:
      statistics: see `NormStatistics`.
      initial: $\beta_0$, in [0, 1).
      sensitivity: $\kappa$, see `ratcheted_momentum`.
      minimum: lower bound of $\beta_k$ where the noise lowers it, in [0, 1).
      maximum: upper bound of $\beta_k$, in [0, 1).

    Returns:
      The momentum coefficients, of the statistics' shape.

    Raises:
      ValueError: a setting is out of range, or the bounds are the wrong way round.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.zeros(3))
      >>> [round(float(momentum), 3) for momentum in anchored_momentum(seen)]
      [0.93, 0.91, 0.91]
    """
    return _lowered(initial, statistics.deviation, initial, sensitivity, minimum, maximum)


@_rule
def relative_momentum(
    statistics: NormStatistics,
    *,
    initial: Any = 0.95,
    sensitivity: Any = 0.25,
    minimum: Any = 0.7,
    maximum: Any = 0.999,
) -> jax.Array:
    r"""Momentum from the relative noise: $\beta_0 - \kappa_k \hat\sigma_k / \hat\mu_k$.

    The statistics are bias-corrected. The momentum does not change when a loss is rescaled.

    Args:
      statistics: see `NormStatistics`.
      initial: $\beta_0$, in [0, 1).
      sensitivity: $\kappa$, see `ratcheted_momentum`.
      minimum: lower bound of $\beta_k$ where the noise lowers it, in [0, 1).
      maximum: upper bound of $\beta_k$, in [0, 1).

    Returns:
      The momentum coefficients, of the statistics' shape.

    Raises:
      ValueError: a setting is out of range, or the bounds are the wrong way round.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.01), remainder=jnp.zeros(3))
      >>> [round(float(momentum), 3) for momentum in relative_momentum(seen)]
      [0.867, 0.867, 0.867]
    """
    noise = divide(floored_sqrt(statistics.variance), statistics.mean)
    return _lowered(initial, noise, initial, sensitivity, minimum, maximum)
