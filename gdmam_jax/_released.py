"""The released form: one AdamW with AMSGrad whose first decay is steered, and its clipping."""

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import Allocation, Allocator
from gdmam_jax._checks import check_learning_rate, check_range, check_scheduled, check_state
from gdmam_jax._gates import cosine_gate
from gdmam_jax._momenta import MomentumRule, NormStatistics, ratcheted_momentum
from gdmam_jax._numerics import (
    floored_sqrt,
    map_leaves,
    pytree_dataclass,
    register_with_flax,
    safe_sqrt,
    wide_dtype,
    wide_zeros_like,
    widen,
    zeros_like,
)
from gdmam_jax._pairs import GradientPair, check_floating, halves, named_leaves
from gdmam_jax._weightings import constant_weighting

FLOOR = 1e-12
"""What the released code adds to every norm."""


@pytree_dataclass
class RecentNormState:
    """State of `clip_by_recent_norm`.

    Attributes:
      norms: the last accepted norms, oldest first; float32 or better, shape ``(window,)``; at
        first 0, except for an infinite last one, so that the first ``window`` updates pass
        unclipped.
    """

    norms: jax.Array


@pytree_dataclass
class ReleasedState:
    """State of the released form.

    Attributes:
      count: steps taken; int32, shape ``()``.
      allocation: what the last step decided; see `Allocation`.
      statistics: of the components' norms, and the step's momentum; see `NormStatistics`.
      decay: the first moment's decay at the last step, ``b1``; float32 or better, shape ``()``.
      first_moment: a tree like the parameters, of their dtypes.
      second_moment: a tree like the parameters, float32 or better.
      second_moment_maximum: its largest value so far; likewise.
      clipping: see `RecentNormState`.
    """

    count: jax.Array
    allocation: Allocation
    statistics: NormStatistics
    decay: jax.Array
    first_moment: Any
    second_moment: Any
    second_moment_maximum: Any
    clipping: RecentNormState


def clip_by_recent_norm(
    factor: Any = 5.0, window: int = 5
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the norm of an update at a multiple of the largest of the last accepted ones.

    With $M$ the largest norm in the queue and $n$ the update's norm, the update is
    scaled by $\min(1, factor \cdot M / (n + 10^{-6}))$, and $\min(n, 2 M, 1)$ joins the
    queue. The queue starts with an infinite norm, so nothing is clipped until ``window`` updates
    have passed. A norm that is not finite does not join it.

    Args:
      factor: how many times the largest recent norm an update may have, above 0.
      window: how many norms the queue holds, at least 1.

    Returns:
      A transformation of ordinary updates; put it behind the link that takes pairs.

    Raises:
      ValueError: ``factor`` or ``window`` is out of range.
      TypeError: at ``init``, ``window`` is not a whole number.

    Examples:
      >>> import jax.numpy as jnp
      >>> clip = clip_by_recent_norm(factor=2.0, window=1)
      >>> state = clip.init(jnp.zeros(1))
      >>> update, state = clip.update(jnp.array([0.5]), state)
      >>> update, state = clip.update(jnp.array([4.0]), state)
      >>> round(float(update[0]), 4)
      1.0

    References:
      The clipping of the released GDMAM and RDA code.
    """
    check_range("factor", factor, above_minimum=True)
    check_range("window", window, 1)

    def init(params: optax.Params) -> RecentNormState:
        register_with_flax()
        check_floating(params, "parameter")
        dtype = wide_dtype(*jax.tree.leaves(params))
        return RecentNormState(norms=jnp.zeros(_whole(window), dtype).at[-1].set(jnp.inf))

    def update(
        updates: optax.Updates,
        state: RecentNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RecentNormState]:
        del params, extra_args
        check_state(state, RecentNormState)
        check_floating(updates, "update")
        size = safe_sqrt(optax.tree.norm(jax.tree.map(widen, updates), squared=True))
        scale, state = _accept(state, size, factor)
        scaled = jax.tree.map(
            lambda leaf: (scale * widen(leaf)).astype(jnp.result_type(leaf)), updates
        )
        return scaled, state

    return optax.GradientTransformationExtraArgs(init, update)


def _whole(window: Any) -> int:
    try:
        return operator.index(window)
    except TypeError as error:
        raise TypeError(
            f"the window must be a whole number, got {window!r}; inside a compiled init give "
            "optax.inject_hyperparams static_args=('window',), or ('clip_window',)"
        ) from error


def _accept(
    state: RecentNormState, size: jax.Array, factor: Any
) -> tuple[jax.Array, RecentNormState]:
    """The scale of an update of norm ``size``, and the state after it."""
    norms = state.norms
    size = size.astype(norms.dtype)
    largest = jnp.max(norms)
    # Infinity is kept out of the quotient, whose derivative would not be a number.
    started = jnp.isfinite(largest)
    quotient = factor * jnp.where(started, largest, 1) / (size + 1e-6)
    scale = jnp.where(started, jnp.minimum(1, quotient), 1)
    accepted = jnp.append(norms[1:], jnp.minimum(jnp.minimum(size, 2 * largest), 1))
    return scale, RecentNormState(norms=jnp.where(jnp.isfinite(size), accepted, norms))


def gdmam_released(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    initial_momentum: Any = 0.95,
    minimum_momentum: Any = 0.7,
    maximum_momentum: Any = 0.999,
    prediction_sensitivity: Any = 0.05,
    parallel_sensitivity: Any = 0.1,
    orthogonal_sensitivity: Any = 0.1,
    statistics_decay: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    clip_factor: Any = 5.0,
    clip_window: int = 5,
    weight_decay: Any = 1e-4,
    bias_weight_decay: Any = 0.01,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GDMAM as its released PyTorch code computes it, for reproducing its results.

    One AdamW with AMSGrad, on the weighted sum of the two gradients, with a first decay that is
    steered by the geometry:

    $$
    \begin{aligned}
    b_1 &= \operatorname{clip}(w_p \beta_p + \operatorname{gate}\, \beta_\parallel
        + (1 - \operatorname{gate})\, \beta_\perp, 0.7, 0.999), \\
    g &= \operatorname{clipped}(w_p g_p + w_a g_a), \qquad m \leftarrow b_1 m + (1 - b_1) g, \\
    v &\leftarrow b_2 v + (1 - b_2) g^2, \qquad v_{\max} \leftarrow \max(v_{\max}, v), \\
    u &= \frac{m}{1 - b_1^t} \Big/ \Big(\sqrt{v_{\max} / (1 - b_2^t)} + \operatorname{eps}\Big).
    \end{aligned}
    $$

    Biases are the parameters whose last name on their path contains "bias". They decay by 0.01: the
    released code means to leave them undecayed, but sets no value for them and so gets PyTorch's
    default.

    Args:
      learning_rate: a number, or a schedule of the step.
      initial_momentum: $\beta_k$ before the first step, in [0, 1).
      minimum_momentum: lower bound of $\beta_k$ and $b_1$, in [0, 1).
      maximum_momentum: upper bound of $\beta_k$ and $b_1$, in [0, 1).
      prediction_sensitivity: how strongly noise lowers the prediction momentum, at least 0.
      parallel_sensitivity: the same for the parallel part.
      orthogonal_sensitivity: the same for the orthogonal part.
      statistics_decay: decay of the norms' running statistics, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, above 0.
      clip_factor: see `clip_by_recent_norm`.
      clip_window: see `clip_by_recent_norm`.
      weight_decay: decay of all parameters but biases, at least 0.
      bias_weight_decay: decay of biases, at least 0.
      axis_name: inside `jax.shard_map`, the mesh axes over which parameters are sharded: the inner
        products are summed over them.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair` and the parameters.

    Raises:
      ValueError: a number is out of range. While tracing: pairs whose halves differ, a structure or
        shape other than the parameters', or ``present=``.
      TypeError: while tracing, an update that is not a `GradientPair`, or a parameter that is not
        floating-point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.gdmam_released()
      >>> params = {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
      >>> pairs = gdmam.pair_gradients(params, params)
      >>> updates, state = optimizer.update(pairs, optimizer.init(params), params)
      >>> [round(float(update), 7) for update in (updates["kernel"][0], updates["bias"][0])]
      [-0.0010001, -0.00101]

    References:
      The behaviour of the released GDMAM code, observed by running it.
    """
    check_learning_rate(learning_rate)
    check_scheduled("weight_decay", weight_decay)
    check_scheduled("bias_weight_decay", bias_weight_decay)
    form = _Form(
        allocator=Allocator(
            weighting=constant_weighting(1, 1),
            statistics_decay=statistics_decay,
            axis_name=axis_name,
            floor=FLOOR,
        ),
        momentum=ratcheted_momentum(
            initial=initial_momentum,
            sensitivity=(prediction_sensitivity, parallel_sensitivity, orthogonal_sensitivity),
            minimum=minimum_momentum,
            maximum=maximum_momentum,
        ),
        bounds=(minimum_momentum, maximum_momentum),
        b2=b2,
        eps=eps,
        clip_factor=clip_factor,
        clipping=clip_by_recent_norm(clip_factor, clip_window),
    )
    return optax.chain(
        optax.GradientTransformationExtraArgs(form.init, form.update),
        optax.add_decayed_weights(weight_decay, mask=lambda tree: _bias_mask(tree, False)),
        optax.add_decayed_weights(bias_weight_decay, mask=lambda tree: _bias_mask(tree, True)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _bias_mask(tree: Any, biases: bool) -> Any:
    mask = [("bias" in name.rsplit("/", 1)[-1]) == biases for name, _ in named_leaves(tree)]
    structure: Any = jax.tree.structure(tree)
    return structure.unflatten(mask)


def _correction(decay: Any, steps: jax.Array) -> jax.Array:
    """``1 - decay**steps`` without the cancellation, for a decay close to 1."""
    complement = 1 - jnp.asarray(decay, steps.dtype)
    return -jnp.expm1(steps * jnp.log1p(-jnp.minimum(complement, 1 - jnp.finfo(steps.dtype).eps)))


@dataclasses.dataclass(frozen=True)
class _Form:
    """The released form's direction, before weight decay and learning rate."""

    # The momenta follow the components' own norms: nothing is weighed or gated before that.
    allocator: Allocator
    momentum: MomentumRule
    bounds: tuple[Any, Any]
    b2: Any
    eps: Any
    clip_factor: Any
    clipping: optax.GradientTransformation

    def __post_init__(self) -> None:
        check_range("b2", self.b2, 0, 1, below_maximum=True)
        check_range("eps", self.eps, above_minimum=True)

    def init(self, params: optax.Params) -> ReleasedState:
        """The state before the first step."""
        allocation = self.allocator.init(params)
        return ReleasedState(
            count=jnp.zeros((), jnp.int32),
            allocation=allocation,
            statistics=NormStatistics.start(allocation.sizes.shape, allocation.norms.dtype),
            decay=jnp.zeros((), allocation.weights.dtype),
            first_moment=zeros_like(params),
            second_moment=wide_zeros_like(params),
            second_moment_maximum=wide_zeros_like(params),
            clipping=self.clipping.init(params),
        )

    def steer(self, allocation: Allocation, old: NormStatistics) -> tuple[Any, ...]:
        """The statistics, the weights, the gate, ``b1``, and the weighted gradient's norm."""
        statistics = old.after(allocation.sizes, self.allocator.statistics_decay)
        statistics = dataclasses.replace(statistics, momentum=self.momentum(statistics))
        geometry = allocation.geometry
        lengths = jnp.append(geometry.prediction_norm, geometry.alignment_norm)
        weights = lengths / jnp.sum(lengths)
        gate = jnp.stack(cosine_gate(geometry.cosine, geometry.cosine))
        steered = jnp.sum(statistics.momentum * jnp.append(weights[0], gate))
        b1 = jnp.clip(steered, *self.bounds).astype(weights.dtype)
        # From its parts along and across the prediction gradient.
        along = weights[0] + weights[1] * geometry.projection[0]
        along *= geometry.prediction_norm - FLOOR
        across = weights[1] * (geometry.orthogonal_norm[0] - FLOOR)
        return statistics, weights, gate, b1, safe_sqrt(along**2 + across**2)

    def update(
        self,
        updates: optax.Updates,
        state: ReleasedState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReleasedState]:
        """Takes pairs, and returns one update and the new state."""
        del extra_args
        if present is not None:
            raise ValueError("gdmam_released has no absent losses; gdmam takes present=")
        check_state(state, ReleasedState)
        leaves, structure, previous = self.allocator.begin(
            updates, state.allocation, params, alignment, like=state.first_moment
        )
        if not leaves:
            return structure.unflatten([]), state
        allocation, _ = self.allocator.decide(leaves, previous, None, None)
        statistics, weights, gate, b1, size = self.steer(allocation, state.statistics)
        scale, clipped = _accept(state.clipping, size, self.clip_factor)
        count = optax.safe_increment(state.count)
        steps = count.astype(weights.dtype)
        leaf_step = partial(
            _leaf_step,
            b1=b1,
            b2=jnp.asarray(self.b2, b1.dtype),
            corrections=(_correction(b1, steps), jnp.sqrt(_correction(self.b2, steps))),
            eps=jnp.asarray(self.eps, b1.dtype),
        )
        directions, first, second, largest = map_leaves(
            lambda number, *moments: leaf_step(leaves[number], scale * weights, *moments),
            structure,
            state.first_moment,
            state.second_moment,
            state.second_moment_maximum,
        )
        return directions, ReleasedState(
            count=count,
            allocation=dataclasses.replace(allocation, weights=weights, gate=gate),
            statistics=statistics,
            decay=b1,
            first_moment=first,
            second_moment=second,
            second_moment_maximum=largest,
            clipping=clipped,
        )


# One compiled function for a leaf's step: leaves of equal shape are traced once.
@jax.jit
def _leaf_step(
    pair: GradientPair,
    factors: jax.Array,
    first: jax.Array,
    second: jax.Array,
    largest: jax.Array,
    *,
    b1: jax.Array,
    b2: jax.Array,
    corrections: tuple[jax.Array, jax.Array],
    eps: jax.Array,
) -> tuple[jax.Array, ...]:
    """A leaf's update and its new moments."""
    precision, dtype = second.dtype, first.dtype
    factors, b1, b2, eps, first_correction, root = (
        scalar.astype(precision) for scalar in (factors, b1, b2, eps, *corrections)
    )
    prediction, alignment = (jnp.asarray(half, precision) for half in halves(pair))
    gradient = factors[0] * prediction + factors[1] * alignment
    first = (b1 * first.astype(precision) + (1 - b1) * gradient).astype(dtype)
    second = b2 * second + (1 - b2) * gradient**2
    largest = jnp.maximum(largest, second)
    # (m / c_1) / (sqrt(v_max) / c_2 + eps), with one division an element.
    denominator = floored_sqrt(largest) + eps * root
    direction = (root / first_correction) * first.astype(precision) / denominator
    return direction.astype(dtype), first, second, largest
