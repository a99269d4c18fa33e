"""The losses' names, their order, and what is given for each of them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdmam_jax._checks import is_numeric
from gdmam_jax._pairs import GradientPair, describe, difference, named_leaves


@jax.tree_util.register_static
class Names:
    """The alignment losses' names in a state; empty for one loss, or where they are not yet known.

    An optimizer that was told their number learns the names with the first pairs. Until then they
    equal any others, so that the state keeps its structure.
    """

    def __init__(self, values: tuple[str, ...] = ()):
        self.values = values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names):
            return NotImplemented
        return self.values == other.values or not self.values or not other.values

    def __hash__(self) -> int:
        return hash(Names)

    def __repr__(self) -> str:
        return f"Names({', '.join(self.values)})"


class Losses(NamedTuple):
    """What a weighting may want to know about the losses, apart from their gradients.

    Attributes:
      names: the alignment losses' names, J of them; numbers for those without a name.
      values: the losses' values, shape ``(K,)``; None where ``update`` was not given ``value=``.
      present: which losses are present at this step, booleans of shape ``(K,)``; None for all.
    """

    names: tuple[str, ...] = ()
    values: jax.Array | None = None
    present: jax.Array | None = None


def by_loss(what: str, tree: Any, losses: int | Sequence[str]) -> list[Any]:
    """What ``(prediction, alignment)`` holds for each loss: the prediction's, then the others'.

    Args:
      what: the name of the argument, for messages.
      tree: a pair whose second entry holds one value for each alignment loss.
      losses: how many alignment losses there are, or their names in the order that is wanted.

    Raises:
      ValueError: it holds values for other losses.
    """
    wanted = (
        f"{what} must be like the losses, (prediction, alignment), with one value for each of "
        f"alignment_losses={losses!r}"
    )
    if not isinstance(tree, Sequence) or len(tree) != 2:
        raise ValueError(f"{wanted}; got {describe(tree)}")
    prediction, alignment = tree
    unlike = ""
    if isinstance(losses, int):
        others = jax.tree.leaves(alignment)
        fits = len(others) == losses
    else:
        fits = isinstance(alignment, Mapping) and {*alignment} == {*losses}
        unlike = difference(alignment, losses) if isinstance(alignment, Mapping) else ""
        others = [alignment[name] for name in losses] if fits else []
    each = [prediction, *others]
    if not (fits and all(is_numeric(one) and jnp.shape(one) == () for one in each)):
        raise ValueError(f"{wanted}{unlike}; got {jax.tree.map(describe, tree)}")
    return each


def arranged(
    leaves: Sequence[GradientPair], losses: int | tuple[str, ...]
) -> tuple[list[GradientPair], tuple[str, ...]]:
    """The pairs with the alignment gradients in the losses' order, and the losses' names.

    Args:
      leaves: the pairs, of one structure.
      losses: how many alignment losses there are, or their names in the order that is wanted.

    Raises:
      ValueError: the pairs hold other losses.
    """
    if not leaves:
        return [], ()
    alignment = leaves[0].alignment
    names = tuple(name for name, _ in named_leaves(alignment))
    if isinstance(losses, int):
        if len(names) == losses:
            return list(leaves), () if losses == 1 else names
    elif isinstance(alignment, Mapping) and {*alignment} == {*losses} and len(names) == len(losses):
        ordered = [
            GradientPair(pair.prediction, tuple(pair.alignment[name] for name in losses))
            for pair in leaves
        ]
        return ordered, losses
    raise ValueError(
        f"the optimizer was made for alignment_losses={losses!r}, but the pairs hold "
        f"{len(names)}: {', '.join(names)}; give alignment_losses the number of alignment losses, "
        "or the names in the dictionary that they come in"
    )


def as_array(
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
