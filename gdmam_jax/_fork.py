"""Conflicts settled at the features that several losses share: one backward pass of the trunk."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._allocation import Allocation, Allocator, add_up
from gdmam_jax._checks import check_state
from gdmam_jax._gates import Gate, open_gate
from gdmam_jax._numerics import where, wide_dtype
from gdmam_jax._pairs import GradientPair, named_leaves
from gdmam_jax._remembering import RememberingWeighting
from gdmam_jax._settings import chosen, default
from gdmam_jax._weightings import Weighting, config_weighting


def fork_state(
    losses: int | Sequence[str],
    dtype: Any = jnp.float32,
    *,
    weighting: Weighting | RememberingWeighting = default(config_weighting),
) -> Allocation:
    """The state of a `fork` before its first step.

    Args:
      losses: how many losses there are, including the prediction's, or their names; as in `fork`.
      dtype: float32, or float64.
      weighting: that of the fork, if it is a `RememberingWeighting`.

    Returns:
      A state of zeros.

    Raises:
      ValueError: there are fewer than two losses, or two have the same name.

    Examples:
      >>> fork_state(3).weights.shape
      (3,)
    """
    allocator = Allocator(chosen(weighting), alignment_losses=_others(losses))
    return _floats(allocator.init(jnp.zeros((), dtype)))


def _floats(allocation: Allocation) -> Allocation:
    """With counters and flags as floating-point numbers, since gradients must be."""

    def as_float(leaf: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf if floating else leaf.astype(allocation.norms.dtype)

    return jax.tree.map(as_float, allocation)


def fork(
    features: Any,
    losses: int | Sequence[str],
    *,
    weighting: Weighting | RememberingWeighting = default(config_weighting),
    gate: Gate = default(open_gate),
    state: Allocation | None = None,
    statistics_decay: Any = 0.9,
    axis_name: str | Sequence[str] | None = None,
) -> Any:
    r"""Copies of features, one for each loss, at which the losses' conflict is settled.

    The forward pass is the identity. In the backward pass the cotangents of the copies,
    $\bar z_k$, are treated as an optimizer treats gradients, and their weighed and gated sum

    $$\bar z = \sum_k f_k \bar z_k, \qquad f \text{ from } \langle \bar z_j, \bar z_k\rangle,$$

    goes back through the trunk once. So a fork costs as much as the summed loss, and the result is
    an ordinary gradient, for any optimizer. What follows a copy, such as a loss's own head, gets
    the gradient of its own loss, unweighed.

    Only the derivatives of losses may go through a fork. If a loss itself contains a `jax.grad`
    through it, such as the residual of an equation or a gradient penalty, that inner derivative
    would be weighed, too. Use pairs there.

    Args:
      features: an array, or a tree of arrays, that several losses depend on. Floating-point arrays
        are settled together, others are copied.
      losses: how many losses there are, including the prediction's, or their names. The first is
        the prediction's; numbers by name call it ``"prediction"`` even so.
      weighting: a function ``(gramian, norms) -> weights``, or a `RememberingWeighting`.
      gate: a function ``(cosine, ratio) -> (parallel, orthogonal)``.
      state: what the fork remembers, from `fork_state`, for running means of the norms and for
        `diagnostics`; the new state is its *gradient*. So do not scale or clip it with the other
        gradients. A step whose cotangents are not finite changes nothing in it; after a step that
        reaches no copy it starts afresh. None: the norms are those of this step.
      statistics_decay: decay of the norms' running means, in [0, 1).
      axis_name: inside `jax.shard_map`, `jax.pmap` or a `jax.vmap` over examples, the axes of
        the batch. Without it each shard, or example, settles its own conflict. On a mesh without
        these transformations there is nothing to name.

    Returns:
      As many copies as losses, in a tuple; for names a dictionary. Each should reach one loss.

    Raises:
      TypeError: ``state`` is no state of a fork, or a choice is not a function; while tracing, no
        array is floating-point, or one is complex.
      ValueError: there are fewer than two losses, ``statistics_decay`` is out of range, or
        ``state`` was made for other losses; while tracing, the weighting does not return a weight
        for each.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> def loss(w, state):
      ...     first, second = gdmam.fork(w, 2, state=state)
      ...     return first[0] + 99 * second[1]
      >>> gradient, state = jax.grad(loss, argnums=(0, 1))(jnp.zeros(2), gdmam.fork_state(2))
      >>> [round(element, 3) for element in gradient.tolist()]
      [50.0, 50.0]
      >>> float(gdmam.diagnostics(state)["cosine"])
      0.0

    References:
      Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018: gradients
      at the features bound those at the parameters.
    """
    allocator = Allocator(
        weighting=chosen(weighting),
        gate=chosen(gate),
        alignment_losses=_others(losses),
        statistics_decay=statistics_decay,
        axis_name=axis_name,
    )
    structure: Any
    leaves, structure = jax.tree.flatten(features)
    floating = _floating(features)
    settled = [jnp.asarray(leaves[number]) for number in floating]
    first = _floats(allocator.init(jnp.zeros((), wide_dtype(*settled))))
    remembers = state is not None
    if state is None:
        if jax.tree.leaves(first.memory):
            raise ValueError(
                f"the weighting remembers: give fork state=fork_state({losses!r}, weighting=...), "
                "and take the new state from its gradient"
            )
        state = first
    check_state(state, Allocation)
    if jax.tree.map(jnp.shape, state) != jax.tree.map(jnp.shape, first):
        named = f" named {state.names.values}" if state.names.values else ""
        raise ValueError(
            f"the state was made for {state.weights.shape[0]} losses{named} or for another "
            f"weighting; make one with fork_state for {losses!r} and this weighting"
        )
    if first.names.values:
        state = dataclasses.replace(state, names=first.names)
    count = 1 + allocator.count
    kinds = dataclasses.replace(allocator.init(state.norms), names=state.names)

    def settle(state: Allocation, *cotangents: Any) -> tuple[Allocation, list[jax.Array]]:
        pairs = [GradientPair(first, rest) for first, *rest in zip(*cotangents, strict=True)]
        previous = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), state, kinds)
        if remembers:
            # A step that reached no copy gave the state's gradient no value but 0.
            lost = (state.remainder == 0).all() & (state.norms == 0).all()
            previous = where(lost, kinds, previous)
        allocation, _ = allocator.decide(pairs, previous, None, None)
        total = [add_up(pair, allocation.factors) for pair in pairs]
        if remembers:
            # What is not finite would stay in the means for good.
            allocation = where(jnp.isfinite(allocation.norms).all(), allocation, previous)
        return _floats(allocation), total

    # In loops, what the choices close over, such as a scheduled preference, must be handed over.
    converted, hidden = jax.closure_convert(settle, state, *[settled] * count)
    copies = []
    for own in _forked(converted, count, state, hidden, settled):
        copy = dict(enumerate(leaves)) | dict(zip(floating, own, strict=True))
        copies.append(structure.unflatten(copy.values()))
    return tuple(copies) if isinstance(losses, int) else dict(zip(losses, copies, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forked(
    settle: Callable[..., Any], count: int, state: Allocation, hidden: Any, leaves: Any
) -> tuple[Any, ...]:
    return (leaves,) * count


def _forward(settle: Any, count: int, state: Any, hidden: Any, leaves: Any) -> tuple[Any, Any]:
    return (leaves,) * count, (state, hidden)


def _backward(settle: Any, count: int, kept: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    state, hidden = kept
    new, total = settle(state, *cotangents, *hidden)
    return new, jax.tree.map(jnp.zeros_like, hidden), total


_forked.defvjp(_forward, _backward)


def _others(losses: Any) -> int | tuple[str, ...]:
    """How many losses there are apart from the prediction's, or their names."""
    number = isinstance(losses, int) and losses >= 2
    names = isinstance(losses, tuple | list) and 2 <= len(losses) == len({*losses})
    if not (number or names):
        raise ValueError(
            "losses must be a number of losses, at least 2, or a sequence of their names, each "
            f"once; got {losses!r}"
        )
    return losses - 1 if number else tuple(map(str, losses[1:]))


def _floating(features: Any) -> list[int]:
    """Which leaves are floating-point arrays."""
    kinds = [jnp.result_type(leaf) for leaf in jax.tree.leaves(features)]
    for (name, _), kind in zip(named_leaves(features), kinds, strict=True):
        if jnp.issubdtype(kind, jnp.complexfloating):
            raise TypeError(
                f"features at {name} have dtype {kind}; expected real floating-point arrays: fork "
                "their real and imaginary parts"
            )
    found = [number for number, kind in enumerate(kinds) if jnp.issubdtype(kind, jnp.floating)]
    if not found:
        raise TypeError(f"fork needs a floating-point array among the features, got {features}")
    return found
