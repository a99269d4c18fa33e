"""Which leaves are decomposed together."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._numerics import wide_dtype
from gdmam_jax._pairs import is_pair, named_leaves

Scope = Callable[[str], Hashable]
"""A function of a leaf's path, such as ``"encoder/kernel"``: leaves with the same result go
together."""


def leaf_scope(path: str) -> str:
    """The scope that gives each leaf a geometry of its own.

    Args:
      path: the leaf's path, such as ``"encoder/kernel"``.

    Returns:
      The path itself, as the leaf's label.

    Examples:
      >>> leaf_scope("encoder/kernel")
      'encoder/kernel'
    """
    return path


@jax.tree_util.register_static
class Scopes:
    """Which leaf belongs to which scope: static data in an optimizer state.

    Attributes:
      labels: the scopes' names, in order of first appearance; empty for one scope over all leaves.
      index: for each leaf, the position of its label; empty for one scope over all leaves.
    """

    def __init__(self, labels: tuple[str, ...] = (), index: tuple[int, ...] = ()):
        self.labels = labels
        self.index = index

    @classmethod
    def of(cls, tree: Any, scope: Scope | None) -> "Scopes":
        """Labels the leaves, or pairs, of ``tree`` by ``scope`` of their paths."""
        if scope is None:
            return cls()
        names = [str(scope(name)) for name, _ in named_leaves(tree, is_leaf=is_pair)]
        numbers: dict[str, int] = {}
        index = tuple(numbers.setdefault(name, len(numbers)) for name in names)
        return cls(tuple(numbers), index)

    # optax.tree.map_params initialises a state without parameters and matches it with a real one:
    # scopes without leaves equal any others.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scopes):
            return NotImplemented
        same = self.labels == other.labels and self.index == other.index
        return same or not self.index or not other.index

    def __hash__(self) -> int:
        return hash(Scopes)

    def __repr__(self) -> str:
        return f"Scopes({', '.join(self.labels)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a scalar of every scope: ``()`` for one scope, else ``(scopes,)``."""
        return (len(self.labels),) if self.labels else ()

    def total(self, terms: Sequence[jax.Array]) -> jax.Array:
        """Adds up a vector of scalars from each leaf, to one vector for every scope."""
        groups: list[list[jax.Array]] = [[] for _ in range(max(1, len(self.labels)))]
        dtype = wide_dtype(*terms)
        for position, scalars in enumerate(terms):
            groups[self.index[position] if self.index else 0].append(scalars.astype(dtype))
        totals = [_sum_in_pairs(group) for group in groups]
        return jnp.stack(totals) if self.labels else totals[0]

    def at(self, scalars: jax.Array, leaf: int) -> jax.Array:
        """The entry of ``scalars``, one per scope, that applies to leaf number ``leaf``."""
        return scalars[self.index[leaf]] if self.index else scalars


def _sum_in_pairs(rows: Sequence[jax.Array]) -> jax.Array:
    """Adds vectors in pairs: rounding and the program grow with the logarithm of their number."""
    total = jnp.stack(rows)
    while len(total) > 1:
        half = len(total) // 2
        total = jnp.concatenate([total[:half] + total[half : 2 * half], total[2 * half :]])
    return total[0]
