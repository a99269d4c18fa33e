"""Paired gradients: where a prediction and an alignment gradient meet."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdmam_jax._numerics import pytree_dataclass

FLATTENED = (
    ". Inside optax.flatten? It makes one vector of all gradients, in which the pairs are lost: "
    "put it around the other links of the chain only"
)


class _Explained(type):
    """Explains itself in JAX's message about differing trees, if a plain optimizer gets pairs."""

    def __repr__(cls) -> str:
        return f"{cls.__name__}, which an ordinary optimizer takes through summed or weighed"


@pytree_dataclass
class GradientPair(metaclass=_Explained):
    """The gradients of one parameter.

    A tree of pairs has the shape of the parameters, with a pair in place of each leaf. So masks,
    partitions and other transformations that match updates with parameters work.

    Attributes:
      prediction: the prediction loss's gradient; shape and dtype of the parameter.
      alignment: the alignment loss's gradient; the same shape and dtype. With several alignment
        losses a tree of such arrays: a tuple, or a dictionary by name.

    Examples:
      >>> import jax.numpy as jnp
      >>> pair = GradientPair(jnp.ones(3), jnp.zeros(3))
      >>> pair.alignment.shape
      (3,)
    """

    prediction: Any
    alignment: Any

    def _refuse(self, *others: Any) -> Any:
        raise TypeError(
            "a GradientPair was taken for an array. Lift a wrapper whose updates in and out must "
            "have the same structure, such as optax.MultiSteps, with over_pairs. Give an ordinary "
            "optimizer its pairs through summed or weighed, inside a wrapper, too: "
            "optax.contrib.sam(gdmam(rate), summed(adversary)). Leaves that optax.masked leaves "
            "out are still pairs: use optax.partition, with summed(optimizer) for these leaves"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __neg__ = __jax_array__ = _refuse


def is_pair(node: Any) -> bool:
    """Whether ``node`` is a `GradientPair`: the ``is_leaf`` of maps over trees of pairs."""
    return isinstance(node, GradientPair)


def halves(pair: GradientPair) -> list[Any]:
    """A pair's gradients: the prediction's, then the alignment losses' in `jax.tree` order."""
    return [pair.prediction, *jax.tree.leaves(pair.alignment)]


def is_nnx_variable(node: Any) -> bool:
    """Whether ``node`` is a variable of Flax NNX, which holds its array in an attribute."""
    return isinstance(node, getattr(sys.modules.get("flax.nnx"), "Variable", ()))


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """The leaves of a tree by path: ``"encoder/kernel"``; ``"(root)"`` for a tree of one leaf.

    The attribute in which an NNX variable holds its array is not part of the name.
    """

    def is_node(node: Any) -> bool:
        return is_nnx_variable(node) or (is_leaf is not None and is_leaf(node))

    return [
        (jax.tree_util.keystr((*path, *inner[1:]), simple=True, separator="/") or "(root)", leaf)
        for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node)
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node, is_leaf=is_leaf)
    ]


def pair_gradients(prediction: optax.Updates, alignment: Any) -> optax.Updates:
    """Joins gradient trees into one tree of pairs.

    Args:
      prediction: gradients of the prediction loss, a tree of floating-point arrays.
      alignment: gradients of the alignment loss, with the same structure, shapes and dtypes. For
        several alignment losses a tuple, list or dictionary of such trees.

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
      >>> several = {"first": {"w": jnp.zeros(2)}, "second": {"w": jnp.ones(2)}}
      >>> sorted(pair_gradients({"w": jnp.ones(2)}, several)["w"].alignment)
      ['first', 'second']
    """
    structure: Any = jax.tree.structure(prediction)
    if jax.tree.structure(alignment) == structure:
        pairs = jax.tree.map(GradientPair, prediction, alignment)
    else:
        trees, losses = _several(alignment, structure)
        if losses is None:
            raise ValueError(
                "prediction and alignment gradients must have one structure, got\n"
                f"{structure} and\n{jax.tree.structure(alignment)}"
                + (FLATTENED if _is_vector(prediction) else "")
            )
        pairs = jax.tree.map(
            lambda gradient, *others: GradientPair(gradient, losses.unflatten(others)),
            prediction,
            *trees,
        )
    check_pairs(pairs)
    return pairs


def _several(alignment: Any, structure: Any) -> tuple[list[Any], Any]:
    """The trees of ``structure`` that a tuple, list or dictionary holds, and its own structure."""
    if not isinstance(alignment, tuple | list | dict) or not alignment:
        return [], None
    trees, losses = jax.tree.flatten(alignment, is_leaf=lambda node: node is not alignment)
    same = all(jax.tree.structure(tree) == structure for tree in trees)
    return trees, losses if same else None


def unpair_gradients(pairs: optax.Updates) -> tuple[optax.Updates, Any]:
    """Splits a tree of pairs into the prediction and the alignment gradients.

    Args:
      pairs: a tree of `GradientPair`.

    Returns:
      ``(prediction, alignment)``, two trees of the parameters' structure; with several alignment
      losses, ``alignment`` is a tuple or dictionary of such trees.

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
    leaves = jax.tree.leaves(pairs, is_leaf=is_pair)
    if leaves:
        outer, inner = jax.tree.structure(prediction), jax.tree.structure(leaves[0].alignment)
        if not jax.tree_util.treedef_is_leaf(inner):
            alignment = jax.tree.transpose(outer, inner, alignment)
    return prediction, alignment


def check_floating(tree: Any, what: str, advice: str = "", where: str = "") -> None:
    """Raise a ``TypeError`` that names the first leaf that is not a real floating-point array.

    Its name is its path, or ``where``.
    """
    for name, leaf in named_leaves(tree):
        array = hasattr(leaf, "shape") and not isinstance(leaf, np.ma.MaskedArray)
        kind: Any = getattr(leaf, "dtype", None) if array else None
        if kind is None and isinstance(leaf, int | float | complex):
            kind = jnp.result_type(leaf)
        traced = isinstance(leaf, jax.core.Tracer)
        if isinstance(leaf, jax.Array) and not traced and leaf.is_deleted():
            raise ValueError(
                f"{what} at {where or name} has been deleted: was it donated to an earlier "
                "compiled step (donate_argnums)?"
            )
        if kind is not None and jnp.issubdtype(kind, jnp.complexfloating):
            raise TypeError(
                f"{what} at {where or name} has dtype {kind}; expected a real floating-point "
                "array: keep its real and imaginary part as two arrays, and let the loss function "
                "join them with jax.lax.complex(real, imaginary)"
            )
        floating = kind is not None and jnp.issubdtype(kind, jnp.floating)
        # JAX has no other byte order, and nothing wider than float64.
        if not (floating and kind.isnative and kind.itemsize <= 8):
            has = f"is {type(leaf).__name__}" if kind is None else f"has dtype {kind}"
            raise TypeError(
                f"{what} at {where or name} {has}; expected a real floating-point array "
                f"(keep other leaves out: {advice or 'use optax.masked or a filter'})"
            )


def begin_update(
    updates: optax.Updates,
    alignment: Any,
    params: optax.Params | None = None,
    like: Any = None,
) -> tuple[list[GradientPair], Any]:
    """What every update does first: takes pairs as they are given, and checks them.

    Args:
      updates: a tree of pairs or, with ``alignment``, the prediction gradients.
      alignment: the alignment gradients, or None.
      params: the parameters, or None.
      like: a tree of the parameters' structure and shapes to compare pairs and parameters with;
        None: ``params``.

    Returns:
      The pairs in a list, and the structure of their tree.

    Raises:
      TypeError: a leaf is not a pair, or not floating-point.
      ValueError: halves of a pair differ, or a tree differs from ``like``.
    """
    pairs = updates if alignment is None else pair_gradients(updates, alignment)
    check_floating(params, "parameter")
    if like is None:
        like = params
    check_pairs(pairs, like)
    if params is not None and params is not like:
        _check_like("params", params, like)
    leaves = jax.tree.leaves(pairs, is_leaf=is_pair)
    return leaves, jax.tree.structure(pairs if like is None else like, is_leaf=is_pair)


def check_pairs(pairs: Any, like: Any = None) -> None:
    """Checks a tree of pairs, by structure, shape and dtype alone.

    Args:
      pairs: what should be a tree of `GradientPair`.
      like: a tree of the parameters' structure and shapes to compare it with, or None.

    Raises:
      TypeError: a leaf is not a pair, or not floating-point.
      ValueError: the halves of a pair differ, or the tree differs from ``like``.
    """
    leaves = named_leaves(pairs, is_leaf=is_pair)
    losses = None
    for where, pair in leaves:
        if not is_pair(pair):
            raise TypeError(
                f"update at {where} is {describe(pair)}; expected a GradientPair: make pairs with "
                "value_and_paired_grad or pair_gradients, or pass alignment=gradients to update; "
                "lift a wrapper such as optax.MultiSteps with over_pairs"
                + (FLATTENED if _is_vector(pairs) else "")
            )
        if not jax.tree_util.all_leaves([pair.prediction]):
            raise TypeError(
                f"the prediction half of the pair at {where} is {describe(pair.prediction)}; "
                "expected an array: make pairs of two trees with pair_gradients"
            )
        check_floating(pair.prediction, "the prediction gradient", where=where)
        check_floating(pair.alignment, "the alignment gradient", where=where)
        for gradient in jax.tree.leaves(pair.alignment):
            if jnp.shape(pair.prediction) != jnp.shape(gradient) or (
                jnp.result_type(pair.prediction) != jnp.result_type(gradient)
            ):
                raise ValueError(
                    f"the two gradients at {where} must agree in shape and dtype, got prediction "
                    f"{describe(pair.prediction)} and alignment {describe(gradient)}"
                )
        structure: Any = jax.tree.structure(pair.alignment)
        if structure.num_leaves == 0 or (losses is not None and structure != losses):
            raise ValueError(
                f"the alignment half of the pair at {where} must hold the gradients of the same "
                f"alignment losses as every other pair, got {structure} here and {losses} elsewhere"
            )
        losses = structure
    if like is not None:
        _check_like("the tree of pairs", pairs, like)


def _check_like(what: str, tree: Any, like: Any) -> None:
    """Compares parameters, or pairs of their gradients, with a tree's structure and shapes."""
    found, expected = named_leaves(tree, is_leaf=is_pair), named_leaves(like)
    structure: Any = jax.tree.structure(tree, is_leaf=is_pair)
    wanted: Any = jax.tree.structure(like)
    if structure != wanted:
        raise ValueError(
            f"{what} must have the structure of the parameters that the optimizer was "
            f"initialised with{difference(dict(found), dict(expected))}; expected {wanted}, got "
            f"{structure}"
        )
    for (where, leaf), (_, model) in zip(found, expected, strict=True):
        has = leaf.prediction if is_pair(leaf) else leaf
        if jnp.shape(has) != jnp.shape(model):
            raise ValueError(
                f"{what} has an array of shape {jnp.shape(has)} at {where}; expected the "
                f"parameter's {jnp.shape(model)}"
            )


def _is_vector(tree: Any) -> bool:
    return getattr(tree, "ndim", None) == 1


def describe(leaf: Any) -> str:
    """Dtype and shape of an array, the type of anything else: for messages."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__


def difference(found: Iterable[str], expected: Iterable[str]) -> str:
    """Which names are missing and which unknown: for messages."""
    missing, unknown = sorted({*expected} - {*found}), sorted({*found} - {*expected})
    return "".join(
        f" ({word}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for word, names in (("missing", missing), ("unknown", unknown))
        if names
    )
