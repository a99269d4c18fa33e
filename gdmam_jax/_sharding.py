"""Sums over the shards of gradients that lie on several devices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def as_axis_names(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes that an ``axis_name`` argument names."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a string or a sequence of strings, got {axis_name!r}")
    return tuple(names)


def explicit_mesh(leaves: Any) -> Any:
    """The mesh that all leaves lie on, if their types say how they are sharded; else None."""
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(leaves)]
    meshes = {sharding.mesh for sharding in shardings}
    mesh = meshes.pop() if len(meshes) == 1 else None
    return mesh if mesh is not None and mesh.shape and mesh.are_all_axes_explicit else None


class Across:
    """Sums over shards inside `jax.shard_map`, in which what several shards hold counts once."""

    def __init__(self, leaves: Any, names: tuple[str, ...]):
        # With check_vma=False nothing is known to vary, not even the index along the axis itself.
        self.known = {name for name in names if name in _varying(jax.lax.axis_index(name))}
        varied = frozenset().union(*map(_varying, jax.tree.leaves(leaves))) if names else ()
        self.axes = tuple(name for name in names if name in varied or name not in self.known)

    def share(self, term: jax.Array) -> jax.Array:
        """What one shard adds to the sum of ``term`` over the axes."""
        whole = tuple(name for name in self.axes if name in self.known - _varying(term))
        if not whole:
            return term
        copies = math.prod(jax.lax.axis_size(name) for name in whole)
        return jax.lax.pcast(term / copies, whole, to="varying")

    def copies(self, arrays: Sequence[jax.Array]) -> Any:
        """How often a sum over the axes counts each inner product of arrays; ``(K, K)``, or 1.

        It counts repeatedly the product of two arrays that both lie whole along an axis over which
        another array is sharded.
        """
        varied = [_varying(array) & self.known for array in arrays]
        sharded = frozenset().union(*varied)
        if all(axes == sharded for axes in varied):
            return 1
        rows = [[sharded - one - other for other in varied] for one in varied]
        return jnp.array(
            [[math.prod(map(jax.lax.axis_size, axes)) for axes in row] for row in rows]
        )

    def sum(self, totals: jax.Array) -> jax.Array:
        """The sum of all shards' totals: one message."""
        return jax.lax.psum(totals, self.axes) if self.axes else totals


def _varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which ``x`` is known to differ, inside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying
