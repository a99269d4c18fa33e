"""What happens to a step whose gradients are not finite."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import Allocation
from gdmam_jax._checks import check_range
from gdmam_jax._numerics import pytree_dataclass

NotFinite = Literal["apply", "skip"]


@pytree_dataclass
class SkippingState:
    """State of an optimizer with ``not_finite="skip"``.

    Attributes:
      skipped: steps skipped so far; int32, shape ``()``.
      in_a_row: steps that were not finite since the last finite one; likewise.
      inner: the optimizer's own state, as of the last step that was not skipped.
    """

    skipped: jax.Array
    in_a_row: jax.Array
    inner: Any


def with_policy(
    optimizer: optax.GradientTransformationExtraArgs, not_finite: NotFinite, max_skips: Any
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that leaves out the steps whose inner products are not finite, if so chosen.

    Inner products are finite only where every element of every gradient is: no pass over memory
    is needed to know, and all devices that share the inner products decide alike.
    """
    if not_finite not in ("apply", "skip"):
        raise ValueError(f"not_finite must be 'apply' or 'skip', got {not_finite!r}")
    if max_skips is not None:
        check_range("max_skips", max_skips)
        if not_finite == "apply":
            raise ValueError("max_skips needs not_finite='skip'")
    skips = not_finite == "skip"

    def init(params: optax.Params) -> Any:
        if not skips:
            return optimizer.init(params)
        none = jnp.zeros((), jnp.int32)
        return SkippingState(skipped=none, in_a_row=none, inner=optimizer.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if isinstance(state, SkippingState) != skips:
            raise ValueError(
                "the optimizer state was made with another choice of not_finite than this "
                f"optimizer's {not_finite!r}; make a state with its own init"
            )
        if not skips:
            return optimizer.update(updates, state, params, **extra_args)
        changes, inner = optimizer.update(updates, state.inner, params, **extra_args)
        finite = _finite(inner)
        apply = finite if max_skips is None else finite | (state.in_a_row >= max_skips)
        # p + (-0.0) is p to the last bit, also where p is -0.0.
        changes = jax.tree.map(lambda change: jnp.where(apply, change, -0.0), changes)
        inner = jax.tree.map(lambda new, old: jnp.where(apply, new, old), inner, state.inner)
        more = optax.safe_increment
        return changes, SkippingState(
            skipped=jnp.where(apply, state.skipped, more(state.skipped)),
            in_a_row=jnp.where(finite, 0, more(state.in_a_row)),
            inner=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _finite(state: Any) -> jax.Array:
    """Whether the last step's inner products were finite."""

    def is_allocation(node: Any) -> bool:
        return isinstance(node, Allocation)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_allocation) if is_allocation(node)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(each.gramian)) for each in found]))
