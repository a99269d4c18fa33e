"""What a step decides from the geometry: weights, gate and momentum, each by a small function."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._checks import (
    check_function,
    check_losses,
    check_ordered,
    check_range,
    is_numeric,
)
from gdmam_jax._geometry import ALIGNMENT_SCALARS, Geometry, gramian, norms
from gdmam_jax._numerics import (
    EPS,
    divide,
    floored_sqrt,
    pytree_dataclass,
    register_with_flax,
    wide_dtype,
)
from gdmam_jax._pairs import GradientPair, check_floating, describe, is_pair
from gdmam_jax._scopes import Scope, Scopes
from gdmam_jax._sharding import as_axis_names
from gdmam_jax._weightings import Weighting

COMPONENTS = ("prediction", "parallel", "orthogonal")
"""The components of a step; the last two once for each alignment loss."""


@pytree_dataclass
class NormStatistics:
    r"""Running statistics of the norms of the allocated components.

    The last axis is (prediction, parallel, orthogonal), with the last two once for each alignment
    loss; one row per scope where there are several. float32, or float64 where a parameter is. Mean
    and variance are bias-corrected, and updated as such: the difference of a mean square and a
    squared mean would cancel.

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


Gate = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
"""A function ``(cosine, ratio) -> (parallel, orthogonal)``: factors of the alignment gradient's
parts along and across the prediction gradient."""
MomentumRule = Callable[[NormStatistics, Any, tuple[Any, Any, Any]], Any]
"""A function ``(statistics, initial, sensitivity) -> momentum``: the components' coefficients."""


def cosine_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The better the tasks agree, the more of the parallel part, as released: (gate, 1 - gate).

    $$gate = clip(\cos(g_a, g_p), 0, 1)$$

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in cosine_gate(jnp.array(0.25), jnp.array(1.0))]
      [0.25, 0.75]

    References:
      The gate of the released GDMAM code.
    """
    gate = jnp.clip(cosine, 0, 1)
    return gate, 1 - gate


def conflict_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drops the parallel part where it opposes the prediction gradient, and nothing else.

    For two losses and no momentum the alignment gradient then is projected as PCGrad projects it.
    The step never raises the prediction loss, but may raise the alignment loss, see
    `priority_gate`.

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      ``(1 if cosine > 0 else 0, 1)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in conflict_gate(jnp.array(-0.25), jnp.array(1.0))]
      [0.0, 1.0]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.
    """
    return (cosine > 0).astype(cosine.dtype), jnp.ones_like(cosine)


def priority_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Drops what opposes the prediction just as far as the alignment loss does not rise for it.

    With $k = -\cos(g_a, g_p) > 0$ and $r$ the ratio of the weighted gradients' norms, the parallel
    part keeps the least factor at which a step along the result does not raise the alignment loss,

    $$v_\parallel = clip\left(\frac{k / r + k^2 - 1}{k^2}, 0, 1\right),$$

    and all of it where the gradients agree. To first order, and before a second moment rescales
    the elements, a step then is against neither loss, as long as $k \le r$: an alignment gradient
    that is weaker than that is let through whole, and outvoted. Of several alignment losses, all
    that is kept against the prediction gradient is shortened together where it is longer than what
    is for it: with weights of at least 0 a step never is against the prediction loss, but may be
    against alignment losses.

    Args:
      cosine: of the angles between prediction and alignment gradients, shape ``(..., J)`` for J
        alignment losses; ``()`` for one.
      ratio: $r = w_a |g_a| / (w_p |g_p|)$, the same shape.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(priority_gate(jnp.array(-0.8), jnp.array(1.0))[0]), 4)
      0.6875
      >>> parallel, _ = priority_gate(jnp.array([-0.8, -0.9, -0.5]), jnp.ones(3))
      >>> [round(float(factor), 4) for factor in parallel]
      [0.5135, 0.6547, 0.0]
    """
    conflict = jnp.maximum(-cosine, 0)
    square = jnp.where(conflict > 0, conflict**2, 1)
    kept = jnp.clip((divide(conflict, ratio) + conflict**2 - 1) / square, 0, 1)
    if conflict.ndim and conflict.shape[-1] > 1:
        # In units of the weighed prediction gradient.
        agreeing = 1 + jnp.sum(ratio * jnp.maximum(cosine, 0), axis=-1, keepdims=True)
        opposing = jnp.sum(ratio * conflict * kept, axis=-1, keepdims=True)
        kept = kept * jnp.where(opposing > agreeing, divide(agreeing, opposing), 1)
    return jnp.where((conflict > 0) & (ratio > 0), kept, 1), jnp.ones_like(cosine)


def open_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lets both parts through: ``(1, 1)``.

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      Two ones of its shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in open_gate(jnp.array(-0.25), jnp.array(1.0))]
      [1.0, 1.0]
    """
    return jnp.ones_like(cosine), jnp.ones_like(cosine)


def _filled(sensitivity: Sequence[Any], default: Sequence[float], like: jax.Array) -> jax.Array:
    chosen = [d if s is None else s for s, d in zip(sensitivity, default, strict=True)]
    prediction, *others = [jnp.asarray(value, like.dtype) for value in chosen]
    losses = (like.shape[-1] - 1) // 2
    values = jnp.stack([prediction, *(other for other in others for _ in range(losses))])
    return jnp.broadcast_to(values, like.shape)


def constant_momentum(
    statistics: NormStatistics, initial: Any, sensitivity: tuple[Any, Any, Any]
) -> jax.Array:
    r"""One momentum for all components and steps: $\beta_k = \beta_0$.

    Args:
      statistics: unused but for its shape.
      initial: $\beta_0$.
      sensitivity: unused.

    Returns:
      The momentum coefficients, of the statistics' shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> seen = NormStatistics(momentum=jnp.full(3, 0.7), mean=jnp.full(3, 0.3),
      ...                       variance=jnp.full(3, 0.16), remainder=jnp.array(0.0))
      >>> [round(float(momentum), 3) for momentum in constant_momentum(seen, 0.95, (None,) * 3)]
      [0.95, 0.95, 0.95]
    """
    return jnp.full_like(statistics.mean, initial)


def ratcheted_momentum(
    statistics: NormStatistics, initial: Any, sensitivity: tuple[Any, Any, Any]
) -> jax.Array:
    r"""Momentum that only ever falls: $\beta_k - \kappa_k \sigma_k$. As released.

    The statistics start at 0 and are not bias-corrected, so the first steps pull it down hard.

    Args:
      statistics: see `NormStatistics`; ``momentum`` is the previous step's.
      initial: unused; the momentum starts there.
      sensitivity: $\kappa$ of (prediction, parallel, orthogonal); None stands for 0.05, 0.1, 0.1.

    Returns:
      The momentum coefficients before clipping, of the statistics' shape.

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
      sensitivity: $\kappa$ of (prediction, parallel, orthogonal); None stands for 0.05, 0.1, 0.1.

    Returns:
      The momentum coefficients before clipping, of the statistics' shape.

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
      sensitivity: $\kappa$ of (prediction, parallel, orthogonal); None stands for 0.25 each.

    Returns:
      The momentum coefficients before clipping, of the statistics' shape.

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

    K losses, of which the prediction is the first, and J = K - 1 alignment losses; a leading axis
    over the scopes where there are several. float32, or float64 where a parameter is.

    Attributes:
      statistics: the components' running statistics, and the step's momentum; see
        `NormStatistics`.
      geometry: norms, cosines and projections of the step; zeros before the first.
      norms: running means of the gradients' norms; shape ``(K,)``.
      weights: the tasks' weights; shape ``(K,)``.
      gate: factors of each alignment gradient's (parallel, orthogonal) part; shape ``(2, J)``.
      scopes: the names of the scopes; static.
      names: the names of the alignment losses, empty for one without a name; static.
    """

    statistics: NormStatistics
    geometry: Geometry
    norms: jax.Array
    weights: jax.Array
    gate: jax.Array
    scopes: Scopes
    names: "Names"

    @property
    def factors(self) -> jax.Array:
        """The allocated components as combinations of the gradients: shape ``(..., 1 + 2J, K)``."""
        projection = self.geometry.projection
        alignment = self.weights[..., None, 1:] * self.gate
        parallel, orthogonal = alignment[..., 0, :], alignment[..., 1, :]
        along = jnp.concatenate(
            [self.weights[..., :1], parallel * projection, -orthogonal * projection], axis=-1
        )
        losses = orthogonal.shape[-1]
        own = jnp.eye(losses, dtype=along.dtype).reshape(*[1] * (along.ndim - 1), losses, losses)
        across = orthogonal[..., None] * own
        nothing = jnp.zeros((*along.shape[:-1], 1 + losses, losses), along.dtype)
        return jnp.concatenate(
            [along[..., None], jnp.concatenate([nothing, across], axis=-2)], axis=-1
        )

    @property
    def sizes(self) -> jax.Array:
        """The norms of the allocated components, of the statistics' shape."""
        geometry = self.geometry
        parts = jnp.stack([geometry.parallel_norm, geometry.orthogonal_norm], axis=-2)
        parts = self.weights[..., None, 1:] * self.gate * parts
        prediction = self.weights[..., :1] * geometry.prediction_norm[..., None]
        return jnp.abs(jnp.concatenate([prediction, parts[..., 0, :], parts[..., 1, :]], axis=-1))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Names:
    """Static text in a state."""

    values: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Allocator:
    """The choices of an optimizer, and how they decide a step.

    The arguments of `scale_by_gdmam` of the same names, with the sensitivities in one tuple.
    """

    weighting: Weighting
    gate: Gate
    momentum: MomentumRule
    scope: Scope | None = None
    alignment_losses: int | Sequence[str] | None = None
    initial_momentum: Any = 0.95
    minimum_momentum: Any = 0.7
    maximum_momentum: Any = 0.999
    sensitivity: tuple[Any, Any, Any] = (None, None, None)
    statistics_decay: Any = 0.9
    axis_name: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("weighting", "gate", "momentum", "scope"):
            choice = getattr(self, name)
            if choice is not None:
                check_function(
                    name,
                    choice,
                    "; optax.inject_hyperparams takes functions for schedules: give it "
                    "static_args=('weighting', 'gate', 'momentum', 'scope')",
                )
        for name in ("minimum_momentum", "maximum_momentum", "initial_momentum"):
            check_range(name, getattr(self, name), 0, 1, below_maximum=True)
        for name in ("minimum_momentum", "initial_momentum"):
            check_ordered(name, getattr(self, name), "maximum_momentum", self.maximum_momentum)
        check_range("statistics_decay", self.statistics_decay, 0, 1, below_maximum=True)
        for name, value in zip(COMPONENTS, self.sensitivity, strict=True):
            check_range(f"{name}_sensitivity", 0 if value is None else value)
        check_losses(self.alignment_losses)
        as_axis_names(self.axis_name)

    @property
    def losses(self) -> int | tuple[str, ...]:
        """How many alignment losses there are, or their names in `jax.tree` order."""
        given = self.alignment_losses
        return 1 if given is None else given if isinstance(given, int) else tuple(sorted(given))

    @property
    def count(self) -> int:
        """How many alignment losses there are."""
        return self.losses if isinstance(self.losses, int) else len(self.losses)

    def init(self, params: Any) -> Allocation:
        """The allocation before the first step."""
        register_with_flax()
        check_floating(params, "parameter")
        scopes = Scopes.of(params, self.scope)
        dtype = wide_dtype(*jax.tree.leaves(params))
        losses, count = self.losses, self.count
        names = tuple(map(str, range(losses))) if isinstance(losses, int) else losses

        def zeros(*last: int) -> jax.Array:
            return jnp.zeros(scopes.shape + last, dtype)

        return Allocation(
            statistics=NormStatistics(
                momentum=jnp.full((*scopes.shape, 1 + 2 * count), self.initial_momentum, dtype),
                mean=zeros(1 + 2 * count),
                variance=zeros(1 + 2 * count),
                remainder=jnp.ones((), dtype),
            ),
            geometry=Geometry(
                prediction_norm=zeros(), **{name: zeros(count) for name in ALIGNMENT_SCALARS}
            ),
            norms=zeros(1 + count),
            weights=zeros(1 + count),
            gate=zeros(2, count),
            scopes=scopes,
            names=Names(() if losses == 1 else names),
        )

    def check_state(self, previous: Allocation, pairs: Any) -> None:
        """Raise a ``ValueError`` where a state was made by an optimizer of other choices."""
        scopes = Scopes.of(pairs, self.scope, is_leaf=is_pair)
        shape = (*scopes.shape, 1 + self.count)
        if previous.scopes != scopes or previous.weights.shape != shape:
            raise ValueError(
                "the optimizer state was made with another scope or alignment_losses: it has "
                f"{previous.scopes} and weights of shape {previous.weights.shape}, this optimizer "
                f"{scopes} and {shape}; make a state with this optimizer's init"
            )

    def step(self, leaves: Sequence[GradientPair], previous: Allocation) -> Allocation:
        """Measures the pairs and decides weights, gate and momentum for this step."""
        old = previous.statistics
        dtype = old.mean.dtype
        products = gramian(leaves, previous.scopes, self.axis_name).astype(dtype)
        geometry = Geometry.of(products)
        remainder = (self.statistics_decay * old.remainder).astype(dtype)
        # The newest norm's share of the mean: at the first step all of it, to the last bit.
        share = jnp.where(old.remainder == 1, 1, (1 - self.statistics_decay) / (1 - remainder))
        share = share.astype(dtype)
        n_p, n_a = geometry.prediction_norm[..., None], geometry.alignment_norm
        means = previous.norms + share * (norms(products) - previous.norms)
        weights = _as_array(
            "weighting", self.weighting(products, means), means.shape, dtype, "weights"
        )
        size_p, size_a = weights[..., :1] * n_p, weights[..., 1:] * n_a
        counts = size_p > EPS * size_a
        ratio = jnp.where(counts, size_a / jnp.where(counts, size_p, 1), 1 / EPS)
        parts = self.gate(geometry.cosine, ratio)
        gate = jnp.moveaxis(
            _as_array("gate", parts, (*ratio.shape, 2), dtype, "factors", stacked=True), -1, -2
        )
        decided = dataclasses.replace(
            previous, geometry=geometry, norms=means, weights=weights, gate=gate
        )
        change = decided.sizes - old.mean
        statistics = NormStatistics(
            momentum=old.momentum,
            mean=old.mean + share * change,
            variance=(1 - share) * (old.variance + share * change**2),
            remainder=remainder,
        )
        initial = jnp.asarray(self.initial_momentum, dtype)
        momentum = _as_array(
            "momentum",
            self.momentum(statistics, initial, self.sensitivity),
            change.shape,
            dtype,
            "coefficients",
        )
        momentum = jnp.clip(
            momentum,
            jnp.minimum(jnp.asarray(self.minimum_momentum, dtype), initial),
            jnp.asarray(self.maximum_momentum, dtype),
        )
        statistics = dataclasses.replace(statistics, momentum=momentum)
        return dataclasses.replace(decided, statistics=statistics)


def _as_array(
    choice: str, values: Any, shape: tuple[int, ...], dtype: Any, what: str, stacked: bool = False
) -> jax.Array:
    """What a user's function returned, in ``shape``: an array, or a sequence over the last axis."""
    count = shape[-1]
    if isinstance(values, tuple | list):
        if len(values) == count:
            rows = [jnp.asarray(value) for value in values if is_numeric(value)]
            if len(rows) == count and all(_fits(row.shape, shape[:-1]) for row in rows):
                rows = [jnp.broadcast_to(row, shape[:-1]).astype(dtype) for row in rows]
                return jnp.stack(rows, axis=-1)
            got = f"{[describe(value) for value in values]}"
        else:
            got = f"{len(values)} values"
    elif not is_numeric(values):
        got = describe(values)
    else:
        array = jnp.asarray(values)
        if not stacked and _fits(array.shape, shape):
            return jnp.broadcast_to(array, shape).astype(dtype)
        got = f"an array of shape {array.shape}"
    raise ValueError(
        f"{choice} must return {count} {what}"
        + (f", each of shape {shape[:-1]}" if stacked else f", an array of shape {shape}")
        + f" or plain numbers; got {got}"
    )


def _fits(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array broadcasts: missing axes in front, or axes of length 1."""
    if len(found) > len(shape):
        return False
    return all(f in (1, s) for f, s in zip(reversed(found), reversed(shape), strict=False))
