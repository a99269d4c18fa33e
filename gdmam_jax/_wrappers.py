"""Optax wrappers around optimizers of pairs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._checks import check_function, check_losses, with_extra_args
from gdmam_jax._numerics import register_with_flax
from gdmam_jax._pairs import (
    FLATTENED,
    GradientPair,
    begin_update,
    check_floating,
    is_nnx_variable,
    is_pair,
    named_leaves,
)


def over_pairs(
    wrapper: Callable[[optax.GradientTransformation], Any],
    optimizer: optax.GradientTransformation,
    *,
    alignment_losses: int | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts an Optax wrapper that needs the same structure for updates going in and coming out.

    GDMAM takes pairs and returns single updates. Some wrappers cannot work with that:
    `optax.MultiSteps` keeps a state of the updates' shape, and `optax.apply_if_finite` chooses
    between the updates that come in and those that go out. Lifted, a wrapper sees pairs on both
    sides. It is initialised with paired parameters, the optimizer inside it returns pairs, and the
    first half of what comes out is the update.

    The optimizer inside must take every leaf. A wrapper that hands leaves to other optimizers, such
    as `optax.partition` or `optax.masked`, needs no lifting. Give the other optimizers their pairs
    through `summed`: ``optax.partition({"a": gdmam(1e-3), "b": summed(optax.sgd(0.1))}, labels)``.
    ``optax.contrib.sam(gdmam(1e-3), summed(adversary))`` needs no lifting, either.

    Args:
      wrapper: a function of one optimizer that returns the wrapped one, for example
        ``lambda tx: optax.MultiSteps(tx, 4)`` or
        ``lambda tx: optax.chain(optax.zero_nans(), tx)``.
      optimizer: the optimizer that takes pairs.
      alignment_losses: the same as the optimizer's: the number of alignment losses, if they come
        in a tuple, or their names, if they come in a dictionary. None: one.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and returns ordinary updates.

    Raises:
      TypeError: ``wrapper`` is not a function, or ``optimizer`` no Optax optimizer; while tracing,
        an update that is not a `GradientPair`.
      ValueError: at ``init``, the wrapper hands leaves to another optimizer, which would take the
        prediction gradient alone; while tracing, the two halves of a pair differ, or there are
        other alignment losses than ``alignment_losses`` says.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1))
      >>> w = jnp.array(1.0)
      >>> state = optimizer.init(w)
      >>> pair = gdmam.GradientPair(jnp.array(1.0), jnp.array(1.0))
      >>> for _ in range(2):
      ...     update, state = optimizer.update(pair, state, w)
      ...     print(round(float(update), 3))
      0.0
      -0.1
    """
    check_function("wrapper", wrapper)
    inner = with_extra_args(optimizer)
    check_losses(alignment_losses)

    taken: list[str] = []

    def paired_init(paired_params: optax.Params) -> optax.OptState:
        own = _first_half(paired_params)
        taken.extend(name for name, _ in named_leaves(own))
        return inner.init(own)

    def paired_update(
        pairs: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(pairs, state, _first_half(params), **extra_args)
        return doubled(updates), state

    wrapped = with_extra_args(
        wrapper(optax.GradientTransformationExtraArgs(paired_init, paired_update))
    )
    losses: Any = jax.tree.structure(_alignment(0, alignment_losses))

    def doubled(tree: Any) -> Any:
        # flax.nnx.Optimizer gives variables to init and arrays to update, and keeps only variables
        # of arrays. So this makes a pair of variables, not a variable that holds a pair.
        return jax.tree.map(
            lambda leaf: GradientPair(leaf, _alignment(leaf, alignment_losses)),
            tree,
            is_leaf=is_nnx_variable,
        )

    def init(params: optax.Params) -> optax.OptState:
        register_with_flax()  # a wrapper may keep pairs in its state
        check_floating(params, "parameter")
        taken.clear()
        state = wrapped.init(doubled(params))
        _check_taken(taken, params)
        # Two halves that are one array get a buffer each, so that the state can be donated.
        return jax.tree.map(_apart, state, is_leaf=is_pair)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        leaves, structure = begin_update(updates, alignment, params)
        pairs = structure.unflatten(leaves)
        found: Any = jax.tree.structure(leaves[0].alignment) if leaves else losses
        if found != losses:
            raise ValueError(
                f"over_pairs was made for alignment_losses={alignment_losses!r}, which come as "
                f"{losses}, but the pairs hold {found}"
            )
        results, state = wrapped.update(pairs, state, doubled(params), **extra_args)
        return _first_half(results), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_taken(taken: list[str], params: optax.Params) -> None:
    """Raise a ``ValueError`` unless the optimizer that takes pairs was handed every leaf."""
    left = [name for name, _ in named_leaves(params) if name not in taken]
    if left and taken == ["(root)"]:
        raise ValueError("the wrapper makes one leaf of all" + FLATTENED)
    if left:
        raise ValueError(
            f"the wrapper hands {', '.join(left[:3])}{', ...' if len(left) > 3 else ''} to another "
            "optimizer, which would get only the prediction gradient. optax.partition and "
            "optax.masked need no over_pairs: write "
            'optax.partition({"a": gdmam(rate), "b": summed(optax.sgd(rate))}, labels)'
        )


def _alignment(leaf: Any, losses: int | Sequence[str] | None) -> Any:
    if losses is None or losses == 1:
        return leaf
    if isinstance(losses, int):
        return (leaf,) * losses
    return dict.fromkeys(losses, leaf)


def _apart(node: Any) -> Any:
    if not (is_pair(node) and isinstance(node.prediction, jax.Array)):
        return node
    shared = all(half is node.prediction for half in jax.tree.leaves(node.alignment))
    return jax.tree.map(jnp.copy, node) if shared else node


def _first_half(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.prediction if is_pair(leaf) else leaf, tree, is_leaf=is_pair
    )
