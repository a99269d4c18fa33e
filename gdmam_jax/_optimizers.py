"""Ready-made optimizers on pairs."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import (
    Allocation,
    Allocator,
    Gate,
    MomentumRule,
    constant_momentum,
    open_gate,
)
from gdmam_jax._checks import check_learning_rate, check_range, check_state, with_extra_args
from gdmam_jax._numerics import narrow, pytree_dataclass, widen
from gdmam_jax._pairs import GradientPair, begin_update, check_floating, halves
from gdmam_jax._scopes import Scope, Scopes
from gdmam_jax._transform import scale_by_gdmam
from gdmam_jax._weightings import Weighting


def gdmam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weighting: Weighting | None = None,
    gate: Gate | None = None,
    momentum: MomentumRule | None = None,
    momenta: Literal["steered", "separate"] = "steered",
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    initial_momentum: Any = 0.95,
    minimum_momentum: Any = 0.7,
    maximum_momentum: Any = 0.999,
    prediction_sensitivity: Any = None,
    parallel_sensitivity: Any = None,
    orthogonal_sensitivity: Any = None,
    statistics_decay: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    amsgrad: bool = False,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    momentum_dtype: Any = None,
    not_finite: Literal["apply", "skip"] = "apply",
    max_skips: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GDMAM ready to use: `scale_by_gdmam` with a second moment, weight decay and learning rate.

    Args:
      learning_rate: a number, or a schedule of the step.
      weighting: see `scale_by_gdmam`, as all arguments not listed here differently.
      gate: see `scale_by_gdmam`.
      momentum: see `scale_by_gdmam`.
      momenta: see `scale_by_gdmam`.
      scope: see `scale_by_gdmam`.
      alignment_losses: see `scale_by_gdmam`.
      initial_momentum: see `scale_by_gdmam`.
      minimum_momentum: see `scale_by_gdmam`.
      maximum_momentum: see `scale_by_gdmam`.
      prediction_sensitivity: see `scale_by_gdmam`.
      parallel_sensitivity: see `scale_by_gdmam`.
      orthogonal_sensitivity: see `scale_by_gdmam`.
      statistics_decay: see `scale_by_gdmam`.
      b2: see `scale_by_gdmam`.
      eps: see `scale_by_gdmam`.
      amsgrad: see `scale_by_gdmam`.
      weight_decay: factor of the decoupled weight decay, at least 0.
      mask: which parameters decay: a tree of booleans of the parameters' structure or a prefix of
        it, or a function of the parameters that returns one. None: all.
      momentum_dtype: see `scale_by_gdmam`.
      not_finite: see `scale_by_gdmam`; ``"skip"`` leaves out weight decay and the schedule's step,
        too, so that parameters stay bit for bit. A schedule that `optax.inject_hyperparams`
        injects goes on.
      max_skips: see `scale_by_gdmam`.
      axis_name: see `scale_by_gdmam`.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair` and the parameters.

    Raises:
      ValueError: a number is out of range.
      TypeError: the learning rate is no number or function, or the mask one boolean. While tracing:
        an update that is not a `GradientPair`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> def losses(w):
      ...     return jnp.sum((w - 1) ** 2), 100 * (w[0] - w[1]) ** 2
      >>> optimizer = gdmam.gdmam(0.1)
      >>> @jax.jit
      ... def step(w, state):
      ...     _, pairs = gdmam.value_and_paired_grad(losses)(w)
      ...     updates, state = optimizer.update(pairs, state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.array([3.0, -2.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(200):
      ...     w, state = step(w, state)
      >>> bool(jnp.all(jnp.abs(w - 1) < 0.1))
      True
    """
    check_range("weight_decay", weight_decay)
    check_learning_rate(learning_rate)
    if isinstance(mask, bool | jax.Array):
        raise TypeError(
            f"mask must be a tree of booleans or a function, got {mask!r}; "
            "optax.inject_hyperparams takes functions for schedules: give it static_args=('mask',)"
        )
    chain = optax.chain(
        scale_by_gdmam(
            weighting=weighting,
            gate=gate,
            momentum=momentum,
            momenta=momenta,
            scope=scope,
            alignment_losses=alignment_losses,
            initial_momentum=initial_momentum,
            minimum_momentum=minimum_momentum,
            maximum_momentum=maximum_momentum,
            prediction_sensitivity=prediction_sensitivity,
            parallel_sensitivity=parallel_sensitivity,
            orthogonal_sensitivity=orthogonal_sensitivity,
            statistics_decay=statistics_decay,
            b2=b2,
            eps=eps,
            amsgrad=amsgrad,
            momentum_dtype=momentum_dtype,
            not_finite=not_finite,
            max_skips=max_skips,
            axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if not_finite == "apply":
        return chain

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        changes, (new, *links) = chain.update(updates, state, params, **extra_args)
        apply = new.skipped == state[0].skipped
        # p + (-0.0) is p to the last bit, also where p is -0.0.
        changes = jax.tree.map(lambda change: jnp.where(apply, change, -0.0), changes)
        links = jax.tree.map(lambda after, old: jnp.where(apply, after, old), links, [*state[1:]])
        return changes, (new, *links)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def summed(
    optimizer: optax.GradientTransformation,
    prediction_weight: Any = 1.0,
    alignment_weight: Any = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """An ordinary optimizer on pairs, through the weighted sum of the gradients.

    The baseline in the same training loop. Inside `optax.partition` it serves the parameters that
    GDMAM should leave alone. It is `weighed` with constant weights, which need no inner products
    and no state.

    Args:
      optimizer: the transformation that takes the sum.
      prediction_weight: factor of the prediction gradient, at least 0.
      alignment_weight: factor of each alignment gradient, at least 0.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients.

    Raises:
      ValueError: a weight is negative; while tracing, the halves of a pair differ.
      TypeError: while tracing, an update that is not a `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.summed(optax.sgd(1.0), alignment_weight=0.5)
      >>> pair = gdmam.GradientPair(jnp.array(1.0), jnp.array(4.0))
      >>> updates, _ = optimizer.update(pair, optimizer.init(jnp.array(0.0)))
      >>> float(updates)
      -3.0
    """
    inner = with_extra_args(optimizer)
    check_range("prediction_weight", prediction_weight)
    check_range("alignment_weight", alignment_weight)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = begin_update(updates, alignment, params)
        sums = [
            _weighted(pair, [prediction_weight] + [alignment_weight] * (len(halves(pair)) - 1))
            for pair in leaves
        ]
        return inner.update(structure.unflatten(sums), state, params, **extra_args)

    def init(params: optax.Params) -> optax.OptState:
        check_floating(params, "parameter")
        return inner.init(params)

    return optax.GradientTransformationExtraArgs(init, update)


@pytree_dataclass
class WeighedState:
    """State of `weighed`.

    Attributes:
      allocation: the norms' running means and the last step's weights; see `Allocation`.
      inner: the optimizer's own state.
    """

    allocation: Allocation
    inner: Any


def weighed(
    optimizer: optax.GradientTransformation,
    weighting: Weighting,
    *,
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    statistics_decay: Any = 0.9,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An ordinary optimizer on pairs, through the sum of the gradients that a weighting weighs.

    The optimizer takes $\sum_k w_k g_k$. With `pcgrad_weighting` this is PCGrad.

    Args:
      optimizer: the transformation that takes the weighted sum.
      weighting: the tasks' weights, a function ``(gramian, norms) -> weights``; see
        `scale_by_gdmam`.
      scope: which leaves are weighed together; see `scale_by_gdmam`.
      alignment_losses: how many alignment losses there are, or their names. None: one.
      statistics_decay: decay of the norms' running means, in [0, 1).
      axis_name: inside `jax.shard_map`, the mesh axes over which parameters are sharded.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients. `diagnostics` finds the weights, the gradients'
      norms and their angle in its state.

    Raises:
      ValueError: a number is out of range; while tracing, the halves of a pair differ, or the
        weighting does not return a weight for each task.
      TypeError: while tracing, an update that is not a `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.weighed(optax.sgd(1.0), gdmam.pcgrad_weighting)
      >>> pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0]))
      >>> updates, _ = optimizer.update(pair, optimizer.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, -1.5]
    """
    inner = with_extra_args(optimizer)
    allocator = Allocator(
        weighting=weighting,
        gate=open_gate,
        momentum=constant_momentum,
        scope=scope,
        alignment_losses=alignment_losses,
        statistics_decay=statistics_decay,
        axis_name=axis_name,
    )

    def init(params: optax.Params) -> WeighedState:
        return WeighedState(allocation=allocator.init(params), inner=inner.init(params))

    def update(
        updates: optax.Updates,
        state: WeighedState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WeighedState]:
        check_state(state, WeighedState)
        leaves, structure = begin_update(updates, alignment, params, losses=allocator.losses)
        allocator.check_state(state.allocation, structure.unflatten(leaves))
        allocation = allocator.step(leaves, state.allocation) if leaves else state.allocation
        scopes: Scopes = allocation.scopes
        sums = [
            _weighted(pair, scopes.at(allocation.weights, number))
            for number, pair in enumerate(leaves)
        ]
        result, inner_state = inner.update(
            structure.unflatten(sums), state.inner, params, **extra_args
        )
        return result, WeighedState(allocation=allocation, inner=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _weighted(pair: GradientPair, weights: Any) -> jax.Array:
    """The sum of a pair's gradients by their weights, taken in float32 or better."""
    dtype = jnp.result_type(pair.prediction)
    wide = [widen(gradient) for gradient in halves(pair)]
    terms = [jnp.asarray(weights[k], wide[0].dtype) * each for k, each in enumerate(wide)]
    return narrow(sum(terms[1:], terms[0]), dtype)
