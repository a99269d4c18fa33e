"""Optax wrappers over pairs."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import optax

from gdmam_jax.pairs import GradientPair, as_pairs, check_pairs, is_pair


def over_pairs(
    wrapper: Callable[[optax.GradientTransformation], Any],
    optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lifts an Optax wrapper that needs updates in and out of one structure.

    GDMAM takes pairs and returns single updates. A wrapper that keeps state of the updates' shape
    (`optax.MultiSteps`), or chooses between the updates that come in and go out
    (`optax.apply_if_finite`), cannot have that. Here it sees pairs on both sides: it is
    initialised with paired parameters, the optimizer inside it answers with pairs, and the first
    half of what comes out is the update.

    Args:
      wrapper: a function of one optimizer that returns the wrapped one, for example
        ``lambda tx: optax.MultiSteps(tx, 4)`` or
        ``lambda tx: optax.chain(optax.zero_nans(), tx)``.
      optimizer: the optimizer that takes pairs.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and returns ordinary updates.

    Raises:
      TypeError: while tracing, an update that is not a `GradientPair`.
      ValueError: while tracing, the two halves of a pair differ.

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
    inner = optax.with_extra_args_support(optimizer)

    def paired_init(paired_params: optax.Params) -> optax.OptState:
        return inner.init(_first_half(paired_params))

    def paired_update(
        pairs: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(pairs, state, _first_half(params), **extra_args)
        return _doubled(updates), state

    wrapped = wrapper(optax.GradientTransformationExtraArgs(paired_init, paired_update))
    if isinstance(wrapped, optax.GradientTransformation):  # optax.MultiSteps is none
        wrapped = optax.with_extra_args_support(wrapped)

    def init(params: optax.Params) -> optax.OptState:
        return wrapped.init(_doubled(params))

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
        results, state = wrapped.update(pairs, state, _doubled(params), **extra_args)
        return _first_half(results), state

    return optax.GradientTransformationExtraArgs(init, update)


def _doubled(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: GradientPair(leaf, leaf), tree, is_leaf=_is_nnx_variable)


def _is_nnx_variable(node: Any) -> bool:
    # flax.nnx.Optimizer initialises with variables, updates with arrays, and keeps variables of
    # arrays only: a pair of variables has to be made, and not a variable with a pair in it.
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _first_half(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: leaf.prediction if is_pair(leaf) else leaf, tree, is_leaf=is_pair
    )
