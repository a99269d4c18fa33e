"""Paired gradients: where a prediction and an alignment gradient meet."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._dataclass import pytree_dataclass

_FLATTENED = (
    ". Inside optax.flatten? It makes one vector of all gradients, in which the pairs are lost: "
    "put it around the other links of the chain only"
)


@pytree_dataclass
class GradientPair:
    """The two gradients of one parameter.

    A tree of pairs has the shape of the parameters, each leaf replaced by a pair. That is what
    lets masks, partitions and other transformations that match updates with parameters work.

    Attributes:
      prediction: the prediction loss's gradient; shape and dtype of the parameter.
      alignment: the alignment loss's gradient; the same shape and dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> pair = GradientPair(jnp.ones(3), jnp.zeros(3))
      >>> pair.alignment.shape
      (3,)
    """

    prediction: Any
    alignment: Any


def is_pair(node: Any) -> bool:
    """Whether ``node`` is a `GradientPair`: the ``is_leaf`` of maps over trees of pairs."""
    return isinstance(node, GradientPair)


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree by path: ``"encoder/kernel"``; ``"(root)"`` for a tree of one leaf."""
    # A Flax NNX variable holds its array in an attribute, which is no part of the name.
    variable = getattr(sys.modules.get("flax.nnx"), "Variable", ())

    def is_node(node: Any) -> bool:
        return isinstance(node, variable) or (is_leaf is not None and is_leaf(node))

    return [
        (jax.tree_util.keystr((*path, *inner[1:]), simple=True, separator="/") or "(root)", leaf)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf)
    ]


def pair_gradients(prediction: optax.Updates, alignment: optax.Updates) -> optax.Updates:
    """Joins two gradient trees to one tree of pairs.

    Args:
      prediction: gradients of the prediction loss, a tree of floating-point arrays.
      alignment: gradients of the alignment loss, the same structure, shapes and dtypes.

    Returns:
      A tree of the same structure with a `GradientPair` for each leaf.

    Raises:
      ValueError: the structures differ, or two leaves differ in shape or dtype.
      TypeError: a leaf is not a floating-point array.

    Examples:
      >>> import jax.numpy as jnp
      >>> pairs = pair_gradients({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
      >>> pairs["w"].prediction
      Array([1., 1.], dtype=float32)
    """
    structures: list[Any] = [jax.tree.structure(tree) for tree in (prediction, alignment)]
    if structures[0] != structures[1]:
        raise ValueError(
            "prediction and alignment gradients must have one structure, got\n"
            f"{structures[0]} and\n{structures[1]}" + (_FLATTENED if _is_vector(prediction) else "")
        )
    pairs = jax.tree.map(GradientPair, prediction, alignment)
    check_pairs(pairs)
    return pairs


def unpair_gradients(pairs: optax.Updates) -> tuple[optax.Updates, optax.Updates]:
    """Splits a tree of pairs into the prediction and the alignment gradients.

    Args:
      pairs: a tree of `GradientPair`.

    Returns:
      ``(prediction, alignment)``, two trees of the parameters' structure.

    Raises:
      TypeError: a leaf is not a `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp
      >>> prediction, alignment = unpair_gradients({"w": GradientPair(jnp.ones(2), jnp.zeros(2))})
      >>> alignment["w"]
      Array([0., 0.], dtype=float32)
    """
    check_pairs(pairs)
    prediction = jax.tree.map(lambda pair: pair.prediction, pairs, is_leaf=is_pair)
    alignment = jax.tree.map(lambda pair: pair.alignment, pairs, is_leaf=is_pair)
    return prediction, alignment


def as_pairs(updates: optax.Updates, alignment: optax.Updates | None = None) -> optax.Updates:
    """The tree of pairs in what an ``update`` was given, whichever way it was given.

    Args:
      updates: a tree of pairs or, with ``alignment``, the prediction gradients.
      alignment: the alignment gradients, or None.
    """
    return updates if alignment is None else pair_gradients(updates, alignment)


def check_floating(tree: Any, what: str) -> None:
    """Raise a ``TypeError`` that names the first leaf that is not a real floating-point array."""
    for name, leaf in named_leaves(tree):
        dtype = getattr(leaf, "dtype", None) or jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{what} at {name} has dtype {dtype}; expected a real floating-point "
                "dtype (keep other leaves out with optax.masked or a filter)"
            )


def check_pairs(pairs: Any, like: Any = None) -> None:
    """Checks a tree of pairs, by structure, shape and dtype alone.

    Args:
      pairs: what should be a tree of `GradientPair`.
      like: a tree of the parameters' structure and shapes to hold it against, or None.

    Raises:
      TypeError: a leaf is not a pair, or not floating-point.
      ValueError: the two halves of a pair differ, or the tree differs from ``like``.
    """
    leaves = named_leaves(pairs, is_leaf=is_pair)
    for where, pair in leaves:
        if not is_pair(pair):
            raise TypeError(
                f"update at {where} is {_describe(pair)}; expected a GradientPair: make pairs with "
                "value_and_paired_grad or pair_gradients, or pass alignment=gradients to update"
                + (_FLATTENED if _is_vector(pairs) else "")
            )
        for half in ("prediction", "alignment"):
            if not jax.tree_util.all_leaves([getattr(pair, half)]):
                raise TypeError(
                    f"the {half} half of the pair at {where} is "
                    f"{_describe(getattr(pair, half))}; expected an array: make pairs of two trees "
                    "with pair_gradients"
                )
            check_floating(getattr(pair, half), f"{half} gradient of the pair at {where}:")
        if jnp.shape(pair.prediction) != jnp.shape(pair.alignment) or (
            jnp.result_type(pair.prediction) != jnp.result_type(pair.alignment)
        ):
            raise ValueError(
                f"the two gradients at {where} must agree in shape and dtype, got prediction "
                f"{_describe(pair.prediction)} and alignment {_describe(pair.alignment)}"
            )
    if like is None:
        return
    check_structure("the tree of pairs", pairs, like, is_leaf=is_pair)
    for (where, pair), leaf in zip(leaves, jax.tree.leaves(like), strict=True):
        if jnp.shape(pair.prediction) != jnp.shape(leaf):
            raise ValueError(
                f"the pair at {where} has gradients of shape "
                f"{jnp.shape(pair.prediction)}; expected the parameter's {jnp.shape(leaf)}"
            )


def check_structure(what: str, tree: Any, like: Any, is_leaf: Any = None) -> None:
    """Raise a ``ValueError`` unless ``tree`` has the structure of ``like``, the parameters'."""
    expected: Any = jax.tree.structure(like)
    found: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    if found != expected:
        difference = _first_difference(named_leaves(tree, is_leaf=is_leaf), named_leaves(like))
        raise ValueError(
            f"{what} must have the structure of the parameters that the optimizer was "
            f"initialised with{difference}; expected {expected}, got {found}"
        )


def _is_vector(tree: Any) -> bool:
    return getattr(tree, "ndim", None) == 1


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return f"a {type(leaf).__name__}"


def _first_difference(leaves: list, like: list) -> str:
    found, expected = ({name for name, _ in named} for named in (leaves, like))
    missing, unknown = sorted(expected - found), sorted(found - expected)
    return "".join(
        f" ({word}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in (("missing", missing), ("unknown", unknown))
        if names
    )


def value_and_paired_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Values and paired gradients of two losses, from one forward pass.

    Like `jax.value_and_grad`, for a function that returns two scalars. The losses are evaluated
    and linearised once, and the linear map is transposed twice, once for each loss. What only one
    of them depends on is left out of the other's backward pass.

    Args:
      loss_fn: returns ``(prediction_loss, alignment_loss)``, two floating-point scalars, or
        ``((prediction_loss, alignment_loss), aux)`` with ``has_aux=True``.
      argnums: which positional argument, or arguments, to differentiate with respect to; trees of
        floating-point arrays.
      has_aux: whether ``loss_fn`` returns auxiliary data beside the losses.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, pairs)``, or
      ``((losses, aux), pairs)`` with ``has_aux=True``. ``pairs`` has the structure of the argument
      with a `GradientPair` for each leaf; for several ``argnums`` a tuple of such trees.

    Raises:
      TypeError: ``loss_fn`` does not return two floating-point scalars, or an argument to
        differentiate holds other than floating-point arrays. Raised while tracing.

    Examples:
      >>> import jax.numpy as jnp
      >>> def losses(w, x):
      ...     hidden = w * x
      ...     return jnp.sum(hidden**2), jnp.sum(hidden)
      >>> (prediction, alignment), pair = value_and_paired_grad(losses)(jnp.array(2.0), 3.0)
      >>> float(pair.prediction), float(pair.alignment)
      (36.0, 3.0)
    """

    def paired(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        positions = argument_positions(argnums, len(args))
        for position in positions:
            check_floating(args[position], f"argument {position} of the loss function,")

        def losses_of(*differentiated: Any) -> tuple[Any, Any]:
            full = list(args)
            for position, value in zip(positions, differentiated, strict=True):
                full[position] = value
            result = loss_fn(*full, **kwargs)
            losses, aux = split_aux(result) if has_aux else (result, None)
            return _check_losses(losses), aux

        chosen = tuple(args[position] for position in positions)
        losses, pushforward, aux = jax.linearize(losses_of, *chosen, has_aux=True)

        def pull_back(index: int) -> Any:
            pullback = jax.linear_transpose(
                lambda *tangents: pushforward(*tangents)[index], *chosen
            )
            return pullback(jax.lax.full_like(losses[index], 1))

        pairs = jax.tree.map(GradientPair, pull_back(0), pull_back(1))
        return (losses, aux) if has_aux else losses, pairs[0] if isinstance(argnums, int) else pairs

    return paired


def argument_positions(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Which of ``count`` positional arguments ``argnums`` means, counted from 0."""
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for position in positions:
        if not -count <= position < count:
            raise TypeError(
                f"argnums={argnums} needs an argument at position {position}, "
                f"but {count} positional arguments were given"
            )
    return tuple(position % count for position in positions)


def split_aux(result: Any) -> tuple[Any, Any]:
    """The losses and the auxiliary data that a loss function returned."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "with has_aux=True the loss function must return "
            f"((prediction_loss, alignment_loss), aux), got {type(result).__name__}"
        )
    return result


def _check_losses(losses: Any) -> tuple[jax.Array, jax.Array]:
    if not isinstance(losses, tuple | list) or len(losses) != 2:
        raise TypeError(
            "the loss function must return two scalars, (prediction_loss, alignment_loss), got "
            + (f"{len(losses)} values" if isinstance(losses, tuple | list) else _describe(losses))
        )
    for name, loss in zip(("prediction", "alignment"), losses, strict=True):
        if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(
                f"the {name} loss must be a floating-point scalar, got {_describe(loss)}"
            )
    return jnp.asarray(losses[0]), jnp.asarray(losses[1])
