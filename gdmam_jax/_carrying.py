"""A training that goes on with other losses."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdmam_jax._allocation import Allocation
from gdmam_jax._numerics import register_with_flax
from gdmam_jax._pairs import is_pair, named_leaves
from gdmam_jax._transform import GDMAMState


def carry_over(old_state: optax.OptState, new_state: optax.OptState) -> optax.OptState:
    """Continues a training with more, fewer or different losses.

    Momenta, second moments and counts stay. What is known about a loss, such as its running norm
    and its weighting's memory, stays with its name, or with its place if losses have no names. A
    new loss has the new state's values, and its separate momenta start at 0. A weighting whose
    memory is of another kind starts afresh.

    Read a checkpoint with the optimizer that wrote it, which knows the losses' names:
    ``restore(path, jax.eval_shape(old_optimizer.init, params))``, or
    ``flax.serialization.from_bytes(old_optimizer.init(params), data)``.

    Args:
      old_state: the state of an optimizer with the losses so far.
      new_state: the ``init`` of the same optimizer with the new losses.

    Returns:
      A state like the new one.

    Raises:
      ValueError: the optimizers differ in more than their losses, or only one of the states knows
        the losses' names.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> few, many = (gdmam.gdmam(0.1, alignment_losses=n) for n in (("a",), ("b", "a")))
      >>> w = jnp.zeros(2)
      >>> pair = gdmam.GradientPair(jnp.array([3.0, 0.0]), {"a": jnp.array([0.0, 4.0])})
      >>> _, state = few.update(pair, few.init(w), w)
      >>> state = gdmam.carry_over(state, many.init(w))
      >>> state[0].allocation.norms.tolist(), int(state[0].count)
      ([3.0, 0.0, 4.0], 1)
    """
    register_with_flax()

    def whole(node: Any) -> bool:
        return isinstance(node, Allocation | GDMAMState) or is_pair(node)

    old_structure: Any
    structure: Any
    old, old_structure = jax.tree.flatten(old_state, is_leaf=whole)
    new, structure = jax.tree.flatten(new_state, is_leaf=whole)
    if old_structure != structure:
        raise ValueError(
            "the states are of optimizers that differ in more than their losses: got\n"
            f"{old_structure} and\n{structure}"
        )
    names = [name for name, _ in named_leaves(new_state, is_leaf=whole)]
    return structure.unflatten(
        [_carried(name, *each) for name, *each in zip(names, old, new, strict=True)]
    )


def _carried(where: str, old: Any, new: Any) -> Any:
    if type(old) is not type(new) and isinstance(new, Allocation | GDMAMState):
        raise ValueError(f"at {where} expected {type(new).__name__}, got {type(old).__name__}")
    if isinstance(new, Allocation):
        return _allocation(where, old, new)
    if isinstance(new, GDMAMState):
        return _state(where, old, new)
    if is_pair(new):
        # Pairs of other losses cannot be added to those to come.
        return old if _alike(old, new) else new
    return _moved(where, old, new, ())


def _alike(old: Any, new: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (old, new)]
    return structures[0] == structures[1]


def _sources(where: str, old: Allocation, new: Allocation) -> list[int | None]:
    """Which of the old alignment losses each new one is; None for one that is new."""
    named = old.names.values, new.names.values
    if all(named):
        return [named[0].index(name) if name in named[0] else None for name in named[1]]
    if any(named):
        raise ValueError(
            f"at {where} the old state has {named[0] or 'no names'} for its losses, the new one "
            f"{named[1] or 'no names'}; give the optimizers of both alignment_losses=names"
        )
    count = old.gate.shape[-1]
    return [place if place < count else None for place in range(new.gate.shape[-1])]


def _allocation(where: str, old: Allocation, new: Allocation) -> Allocation:
    """The new allocation with what the old one knows, but nothing of the last step."""
    skips = [(each.skipped is None, each.skipped_losses is None) for each in (old, new)]
    if old.scopes.labels != new.scopes.labels or skips[0] != skips[1]:
        raise ValueError(
            f"at {where} the states differ in scope or not_finite; make both optimizers with the "
            "same"
        )
    places = [0, *(None if place is None else 1 + place for place in _sources(where, old, new))]
    axes = len(new.scopes.shape)

    def move(before: Any, after: Any) -> Any:
        # A memory may have arrays for all scopes together.
        first = axes if jnp.ndim(after) > axes else 0
        return _moved(where, before, after, places, old.norms.shape[-1], first)

    same = _alike(old.memory, new.memory)
    return dataclasses.replace(
        new,
        norms=move(old.norms, new.norms),
        remainder=move(old.remainder, new.remainder),
        memory=jax.tree.map(move, old.memory, new.memory) if same else new.memory,
        skipped=old.skipped,
        skipped_in_a_row=old.skipped_in_a_row,
        skipped_losses=jax.tree.map(move, old.skipped_losses, new.skipped_losses),
    )


def _state(where: str, old: GDMAMState, new: GDMAMState) -> GDMAMState:
    allocation = _allocation(where, old.allocation, new.allocation)
    before, sources = old.allocation.gate.shape[-1], _sources(where, old.allocation, new.allocation)
    # The components: prediction, then each loss's parallel and each one's orthogonal part.
    components: list[int | None] = [0]
    for start in (1, 1 + before):
        components += [None if place is None else start + place for place in sources]

    def move(a: Any, b: Any) -> Any:
        first = len(new.allocation.scopes.shape) if b.ndim > 1 else 0
        return _moved(where, a, b, components, 1 + 2 * before, first)

    separate = len(new.momenta) > 1
    if separate != (len(old.momenta) > 1) or _buffers(old) != _buffers(new):
        raise ValueError(
            f"at {where} the states differ in momenta, mu_dtype, b2, amsgrad or their parameters; "
            "make both optimizers with the same"
        )
    momenta, correction = old.momenta, old.momentum_correction
    if separate:
        momenta = tuple(
            fresh if source is None else old.momenta[source]
            for fresh, source in zip(new.momenta, components, strict=True)
        )
        correction = move(correction, new.momentum_correction)
    return dataclasses.replace(
        old,
        allocation=allocation,
        statistics=jax.tree.map(move, old.statistics, new.statistics),
        momentum_correction=correction,
        momenta=momenta,
    )


def _buffers(state: GDMAMState) -> Any:
    """Structure, shapes and dtypes of the arrays that are like the parameters."""
    trees = state.momenta[0], state.second_moment, state.second_moment_maximum
    leaves, structure = jax.tree.flatten(trees)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _moved(
    where: str, old: Any, new: Any, places: Sequence[int | None], count: int = 0, first: int = 0
) -> Any:
    """The new array with the old one's numbers, along axes over ``count`` losses by their places.

    Args:
      where: its name, for messages.
      old: an array.
      new: an array with as many axes.
      places: for each of the new losses, its place among the old ones, or None.
      count: how many old losses there are.
      first: the first axis that may be over losses.
    """
    shapes = jnp.shape(old), jnp.shape(new)
    into, out = [], []
    for axis, (before, after) in enumerate(zip(*shapes, strict=False)):
        if axis >= first and places and (before, after) == (count, len(places)):
            into.append([number for number, place in enumerate(places) if place is not None])
            out.append([place for place in places if place is not None])
        else:
            into.append(list(range(after)))
            out.append(list(range(before)))
    if len(shapes[0]) != len(shapes[1]) or [*map(len, into)] != [*map(len, out)]:
        raise ValueError(
            f"at {where} the states hold arrays of shapes {shapes[0]}, {shapes[1]}; expected the "
            "same parameters"
        )
    if into == out == [[*range(size)] for size in shapes[1]]:
        return old
    return jnp.asarray(new).at[np.ix_(*into)].set(jnp.asarray(old)[np.ix_(*out)])
