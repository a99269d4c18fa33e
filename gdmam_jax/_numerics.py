"""Small numerical tools, and the one kind of dataclass that trees and states are made of."""

import dataclasses
import numbers
import sys
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp

T = TypeVar("T")
_DATACLASSES: list[type] = []


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen `chex.dataclass` that type checkers recognise, and that is not a mapping."""
    made = chex.dataclass(cls, frozen=True, mappable_dataclass=False)
    _DATACLASSES.append(made)
    return made


def register_with_flax() -> None:
    """Lets `flax.serialization`, if it has been imported, write and read the dataclasses.

    By itself it knows named tuples, but no dataclasses. Every ``init`` of a state calls this. What
    holds no array, such as the scopes' names, is not written but taken from the target.
    """
    serialization: Any = sys.modules.get("flax.serialization")
    if serialization is None:
        return

    def held(node: Any) -> dict[str, Any]:
        fields = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        return {name: value for name, value in fields.items() if jax.tree.leaves(value)}

    def to_state(node: Any) -> dict[str, Any]:
        return {name: serialization.to_state_dict(value) for name, value in held(node).items()}

    def from_state(target: Any, saved: dict[str, Any]) -> Any:
        expected = held(target)
        if saved.keys() != expected.keys():
            raise ValueError(
                f"the saved {type(target).__name__} was made with other choices than this "
                f"optimizer's; it holds {sorted(saved)}, expected {sorted(expected)}"
            )
        restored = {
            name: serialization.from_state_dict(value, saved[name], name=name)
            for name, value in expected.items()
        }
        return dataclasses.replace(target, **restored)

    for cls in _DATACLASSES:
        serialization.register_serialization_state(cls, to_state, from_state, override=True)


def wide_dtype(*arrays: Any) -> Any:
    """float64 where one of the arrays is, else float32: the precision of inner products."""
    double = any(jnp.result_type(array) == jnp.float64 for array in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def widen(x: Any) -> jax.Array:
    """``x`` in float32 or better, the precision in which inner products and updates are taken."""
    return jnp.asarray(x).astype(wide_dtype(x))


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in ``dtype``, cut at the largest number of that type; what is infinite stays so."""
    if x.dtype == dtype:
        return x
    limit = float(jnp.finfo(dtype).max)
    return jnp.where(jnp.isinf(x), x, jnp.clip(x, -limit, limit)).astype(dtype)


def zeros_like(tree: Any, dtype: Any = None) -> Any:
    """Zeros of the leaves' shapes and shardings, even inside a compiled ``init``.

    There XLA would leave zeros that depend on nothing on one device. A comparison that is never
    true depends on the leaf.
    """

    def zeros(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.core.Tracer):
            return (leaf > jnp.inf).astype(dtype or leaf.dtype)
        return jnp.zeros_like(leaf, dtype=dtype)

    return jax.tree.map(zeros, tree)


def wide_zeros_like(tree: Any) -> Any:
    """The same, of float32 or better."""
    return jax.tree.map(lambda leaf: zeros_like(leaf, wide_dtype(leaf)), tree)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root of ``max(x, 0)`` whose derivative at 0 is 0."""
    zero = x <= 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def floored_sqrt(x: jax.Array) -> jax.Array:
    """Square root of the larger of ``x`` and the smallest normal number: 1e-19 at 0, in float32.

    Its derivative at 0 is 0 too. In every loop XLA repeats the work that made the loop's scalars,
    but none from before a root. `safe_sqrt` looks at ``x`` again, so XLA would repeat that work.
    """
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


@jax.custom_jvp
def divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y``, 0 where ``y`` is 0."""
    zero = y == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))


@divide.defjvp
def _divide_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # JAX's own rule takes 1 / y**2, which overflows below 5e-20 in float32.
    (x, y), (dx, dy) = primals, tangents
    quotient = divide(x, y)
    return quotient, divide(dx - quotient * dy, y)


def random_key(key: Any) -> Any:
    """The key given, or that of a seed; of seed 0 where there is none."""
    seeded = key is None or isinstance(key, numbers.Integral)
    return jax.random.key(int(key or 0)) if seeded else key


def where(condition: Any, new: Any, old: Any) -> Any:
    """A tree's leaves where the condition holds, else the other tree's."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), new, old)


def map_leaves(function: Callable[..., Any], structure: Any, *trees: Any) -> Any:
    """Maps a function with several results over trees, to one tree of each result.

    Args:
      function: of a leaf's number and that leaf of each tree; its results may be None, or tuples.
      structure: of the trees' leaves; what is below them stays together.
      *trees: what to map over; None stands for a tree of Nones.
    """
    numbers = range(structure.num_leaves)
    columns = [
        [None for _ in numbers] if tree is None else structure.flatten_up_to(tree) for tree in trees
    ]
    results = [function(*row) for row in zip(numbers, *columns, strict=True)]
    inner: Any = jax.tree.structure(results[0])
    return jax.tree.transpose(structure, inner, structure.unflatten(results))
