"""Ready-made optimizers on pairs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._checks import check_range
from gdmam_jax.allocation import Gate, MomentumRule, Weighting
from gdmam_jax.geometry import Scope
from gdmam_jax.pairs import as_pairs, check_pairs, is_pair
from gdmam_jax.transform import scale_by_gdmam


def gdmam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weighting: Weighting | None = None,
    gate: Gate | None = None,
    momentum: MomentumRule | None = None,
    scope: Scope | None = None,
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
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GDMAM ready to use: `scale_by_gdmam` with a second moment, weight decay and learning rate.

    Args:
      learning_rate: a number, or a schedule of the step.
      weighting: see `scale_by_gdmam`, as all arguments not listed here differently.
      gate: see `scale_by_gdmam`.
      momentum: see `scale_by_gdmam`.
      scope: see `scale_by_gdmam`.
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
      axis_name: see `scale_by_gdmam`.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair` and the parameters.

    Raises:
      ValueError: a number is out of range.
      TypeError: while tracing, an update that is not a `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> def losses(w):
      ...     return jnp.sum((w - 1) ** 2), 0.1 * jnp.sum(w**2)
      >>> optimizer = gdmam.gdmam(0.1)
      >>> w = jnp.zeros(2)
      >>> state = optimizer.init(w)
      >>> for _ in range(100):
      ...     _, pairs = gdmam.value_and_paired_grad(losses)(w)
      ...     updates, state = optimizer.update(pairs, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(jnp.all(jnp.abs(w - 1) < 0.1))
      True
    """
    check_range("weight_decay", weight_decay)
    return optax.chain(
        scale_by_gdmam(
            weighting=weighting,
            gate=gate,
            momentum=momentum,
            scope=scope,
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
            axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def summed(
    optimizer: optax.GradientTransformation,
    prediction_weight: Any = 1.0,
    alignment_weight: Any = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """An ordinary optimizer on pairs, through the weighted sum of the two gradients.

    The baseline in the same training loop, and what parameters that GDMAM should leave alone get
    inside `optax.partition`.

    Args:
      optimizer: the transformation that takes the sum.
      prediction_weight: factor of the prediction gradient, at least 0.
      alignment_weight: factor of the alignment gradient, at least 0.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients.

    Raises:
      ValueError: a weight is negative; while tracing, the two halves of a pair differ.
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
    check_range("prediction_weight", prediction_weight)
    check_range("alignment_weight", alignment_weight)
    inner = optax.with_extra_args_support(optimizer)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        alignment: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        pairs = as_pairs(updates, alignment)
        check_pairs(pairs)
        total = jax.tree.map(
            lambda pair: (
                prediction_weight * pair.prediction + alignment_weight * pair.alignment
            ).astype(jnp.result_type(pair.prediction)),
            pairs,
            is_leaf=is_pair,
        )
        return inner.update(total, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
