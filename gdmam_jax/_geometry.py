"""The geometry of several gradients: inner products, norms, angles, and the split of one along
and across another.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from gdmam_jax._checks import check_function
from gdmam_jax._numerics import divide, narrow, pytree_dataclass, safe_sqrt, wide_dtype, widen
from gdmam_jax._pairs import GradientPair, check_pairs, halves, is_pair
from gdmam_jax._scopes import Scope, Scopes
from gdmam_jax._sharding import Across, as_axis_names, explicit_mesh

ALIGNMENT_SCALARS = (
    "alignment_norm", "parallel_norm", "orthogonal_norm", "projection", "cosine"
)  # fmt: skip
"""The fields of `Geometry` that exist once for each alignment loss."""

LARGE = 2**20
"""From so many elements on, the inner products of two gradients are taken in one pass, as measured;
of more gradients, from an eighth of it."""
MANY = 8
"""From so many gradients on, their inner products are one matrix product for each leaf, so that the
program's size does not grow with the square of their number."""
BLOCK = 1024
"""How many products a pass adds up one after the other."""


@pytree_dataclass
class Geometry:
    r"""The scalars of a pair of gradients, one of each per scope.

    All float32, or float64 where a gradient is, shape ``()`` or ``(scopes,)``. From `decompose`,
    with several alignment losses, all but ``prediction_norm`` have one more axis, over these
    losses, in the order of `jax.tree.leaves`. In an `Allocation` this axis is always there, in the
    order of ``alignment_losses``. The released form adds $10^{-12}$ to every norm.

    Attributes:
      prediction_norm: $n_p = |g_p|$.
      alignment_norm: $n_a = |g_a|$.
      parallel_norm: $n_\parallel = |c| n_p$.
      orthogonal_norm: $n_\perp = |g_a - c g_p|$.
      projection: $c = \langle g_a, g_p\rangle / n_p^2$, 0 where $g_p = 0$.
      cosine: $\langle g_a, g_p\rangle / (n_a n_p)$, between -1 and 1; 0 where either is 0.
    """

    prediction_norm: jax.Array
    alignment_norm: jax.Array
    parallel_norm: jax.Array
    orthogonal_norm: jax.Array
    projection: jax.Array
    cosine: jax.Array

    @classmethod
    def of(cls, gramian: jax.Array, floor: float = 0.0) -> "Geometry":
        """The geometry that inner products of shape ``(..., K, K)`` determine.

        The orthogonal norm is the root of a difference, accurate to 3e-4 of the alignment norm in
        float32. The alignment losses keep their axis, even if there is only one. ``floor`` is added
        to every norm.
        """
        squares, lengths = _squares(gramian), norms(gramian)
        n_p, n_a = lengths[..., :1] + floor, lengths[..., 1:] + floor
        product = _flat(gramian)[..., 1 : gramian.shape[-1]]
        along = divide(product, n_p)
        projection = divide(along, n_p)
        return cls(
            prediction_norm=n_p[..., 0],
            alignment_norm=n_a,
            parallel_norm=jnp.abs(projection) * lengths[..., :1] + floor,
            orthogonal_norm=safe_sqrt(squares[..., 1:] - along**2) + floor,
            projection=projection,
            cosine=jnp.clip(divide(along, n_a), -1, 1),
        )


def _squares(gramian: jax.Array) -> jax.Array:
    count = gramian.shape[-1]
    if count >= MANY:
        return _flat(gramian)[..., :: count + 1]
    return jnp.stack([_flat(gramian)[..., k * (count + 1)] for k in range(count)], axis=-1)


def _flat(gramian: jax.Array) -> jax.Array:
    # XLA sees through slices of one axis, and so finds the inner products that are not used.
    return gramian.reshape(*gramian.shape[:-2], -1)


def norms(gramian: jax.Array) -> jax.Array:
    """The gradients' norms, shape ``(..., K)``, from their inner products."""
    return safe_sqrt(_squares(gramian))


@pytree_dataclass
class Decomposition:
    """What `decompose` returns.

    Attributes:
      parallel: the alignment gradient's part along the prediction gradient; a tree like the
        parameters, each leaf with its gradient's dtype. With several alignment losses each leaf is
        a tree of such parts.
      orthogonal: its part across the prediction gradient; likewise.
      geometry: the scalars, see `Geometry`.
    """

    parallel: Any
    orthogonal: Any
    geometry: Geometry


def gramian(
    leaves: Sequence[GradientPair], scopes: Scopes, axis_name: str | Sequence[str] | None = None
) -> jax.Array:
    """The inner products of the losses' gradients.

    Args:
      leaves: the pairs, in the order of ``scopes``; at least one.
      scopes: which leaf belongs to which scope.
      axis_name: inside `jax.shard_map`, the mesh axes over which the gradients are sharded. A leaf
        that is whole on some of them counts once there; with ``check_vma=False`` shards cannot be
        told from copies, and every leaf must be sharded over all of them.

    Returns:
      Shape ``(..., K, K)`` with ``...`` the scopes; index 0 is the prediction; float32 or better.
    """
    names = as_axis_names(axis_name)
    mesh = explicit_mesh(leaves)
    if not names and mesh is not None:
        # Shardings are known here: add up the leaves on each device, and send the sums once.
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, list(leaves))
        local = functools.partial(gramian, scopes=scopes, axis_name=mesh.axis_names)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec())(
            list(leaves)
        )
    across = Across(leaves, names)
    count = len(halves(leaves[0]))
    terms = [_terms(halves(pair), across) for pair in leaves]
    # Kept apart until they are sent, so that XLA leaves out a group that is not used.
    totals = [scopes.total(group) for group in zip(*terms, strict=True)]
    products = across.sum(jnp.concatenate(totals, axis=-1))
    if count >= MANY:
        return products.reshape(*products.shape[:-1], count, count)
    position = {pair: k for k, pair in enumerate(itertools.chain(*_groups(count)))}
    entries = [
        products[..., position[min(i, j), max(i, j)]] for i in range(count) for j in range(count)
    ]
    return jnp.stack(entries, axis=-1).reshape(*products.shape[:-1], count, count)


def _groups(count: int) -> list[list[tuple[int, int]]]:
    """Which inner products are taken together: those that norms and gates need, then the others.

    A single other costs less in the first pass than in a pass of its own.
    """
    needed = [(k, k) for k in range(count)] + [(0, k) for k in range(1, count)]
    others = list(itertools.combinations(range(1, count), 2))
    return [needed, others] if len(others) > 1 else [needed + others]


def _terms(gradients: list[Any], across: Across) -> list[jax.Array]:
    """What one leaf, or a shard of it, adds to the inner products: a vector for each group."""
    if len(gradients) >= MANY:
        products = matrix(jnp.stack(gradients))
        copies = jnp.asarray(across.copies(gradients), products.dtype)
        return [across.share(products / copies).ravel()]
    return [jnp.stack([*map(across.share, group)]) for group in _products(gradients)]


# The work on each leaf is a compiled function, so that leaves of equal shape are traced once.
@jax.jit
def _products(gradients: list[Any]) -> list[list[jax.Array]]:
    """The inner products of the gradients, by the groups of `_groups`."""
    wide = [widen(gradient) for gradient in gradients]
    whole = jax.typeof(wide[0]).sharding.mesh.empty
    large = wide[0].size >= (LARGE if len(wide) == 2 else LARGE // 8)
    groups = _groups(len(wide))
    if whole and large and jax.default_backend() == "cpu":
        return [list(_in_one_pass(wide, tuple(group))) for group in groups]
    return [[jnp.sum(wide[left] * wide[right]) for left, right in group] for group in groups]


@jax.jit
def matrix(stacked: jax.Array) -> jax.Array:
    """The inner products of many gradients, along the first axis: one matrix product."""
    axes = list(range(1, stacked.ndim))
    wide = wide_dtype(stacked)
    return jnp.tensordot(
        stacked, stacked, (axes, axes), precision="highest", preferred_element_type=wide
    )


# XLA for CPUs makes a loop of each sum, and every loop reads two gradients. A reduction of several
# operands is one loop. It adds up one by one, so blocks keep it accurate. Sharded gradients go
# without: blocks would cut the shards.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _in_one_pass(arrays: list[jax.Array], group: tuple[tuple[int, int], ...]) -> jax.Array:
    flat = [array.ravel() for array in arrays]
    end = flat[0].size // BLOCK * BLOCK
    blocks, ends = [x[:end].reshape(-1, BLOCK) for x in flat], [x[end:] for x in flat]
    products = [blocks[left] * blocks[right] for left, right in group]
    zeros = [jnp.zeros((), products[0].dtype)] * len(products)
    sums = jax.lax.reduce(products, zeros, lambda x, y: jax.tree.map(jnp.add, x, y), (1,))
    rest = jnp.stack([ends[left] * ends[right] for left, right in group])
    return jnp.sum(jnp.stack(sums), axis=1) + jnp.sum(rest, axis=1)


@_in_one_pass.defjvp
def _in_one_pass_jvp(group: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    moved = [jnp.sum(x[left] * dx[right] + dx[left] * x[right]) for left, right in group]
    return _in_one_pass(x, group), jnp.stack(moved)


def decompose(
    pairs: optax.Updates,
    *,
    scope: Scope | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Decomposition:
    r"""Splits the alignment gradient along and across the prediction gradient.

    $$
    g_\parallel = \frac{\langle g_a, g_p\rangle}{|g_p|^2} g_p, \qquad
    g_\perp = g_a - g_\parallel,
    $$

    where the inner product runs over all leaves of a scope together. Jit-compiled.

    Args:
      pairs: a tree of `GradientPair`, floating-point.
      scope: a function from a leaf's path, such as ``"encoder/kernel"``, to the label of its
        scope, for example `leaf_scope`; None takes all leaves together.
      axis_name: inside `jax.shard_map`, the mesh axes over which the gradients are sharded.

    Returns:
      A `Decomposition`. Its parts add up to the alignment gradient, up to rounding. The orthogonal
      norm is that of the orthogonal part itself, so it is accurate at every angle. Sums of squares
      must not overflow: norms beyond 1e19 in float32 are not finite.

    Raises:
      TypeError: a leaf is not a pair of floating-point arrays.
      ValueError: the tree is empty, or the halves of a pair differ in shape or dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> pairs = {"w": GradientPair(jnp.array([2.0, 0.0]), jnp.array([-1.0, 3.0]))}
      >>> parts = decompose(pairs)
      >>> parts.parallel["w"].tolist(), parts.orthogonal["w"].tolist()
      ([-1.0, -0.0], [0.0, 3.0])
      >>> round(float(parts.geometry.cosine), 4)
      -0.3162
    """
    check_pairs(pairs)
    if scope is not None:
        check_function("scope", scope)
    if not jax.tree.leaves(pairs):
        raise ValueError(f"decompose needs at least one pair of gradients, got {pairs}")
    return _decompose(pairs, scope, as_axis_names(axis_name))


@jax.jit(static_argnames=("scope", "axis_names"))
def _decompose(
    pairs: optax.Updates, scope: Scope | None, axis_names: tuple[str, ...]
) -> Decomposition:
    leaves: list[GradientPair]
    structure: Any
    leaves, structure = jax.tree.flatten(pairs, is_leaf=is_pair)
    scopes = Scopes.of(pairs, scope)
    geometry = Geometry.of(gramian(leaves, scopes, axis_names))
    alignments: Any = jax.tree.structure(leaves[0].alignment)
    across = Across(leaves, axis_names)
    parallel, orthogonal, squares = [], [], []
    for number, pair in enumerate(leaves):
        prediction, *others = [widen(half) for half in halves(pair)]
        projections = scopes.at(geometry.projection, number).astype(prediction.dtype)
        parts = [projections[k] * prediction for k in range(len(others))]
        rests = [other - part for other, part in zip(others, parts, strict=True)]
        dtype = jnp.result_type(pair.prediction)
        parallel.append(alignments.unflatten([narrow(part, dtype) for part in parts]))
        orthogonal.append(alignments.unflatten([narrow(rest, dtype) for rest in rests]))
        squares.append(jnp.stack([across.share(jnp.sum(rest * rest)) for rest in rests]))
    lengths = safe_sqrt(across.sum(scopes.total(squares)))
    geometry = dataclasses.replace(geometry, orthogonal_norm=lengths)
    if jax.tree_util.treedef_is_leaf(alignments):
        geometry = dataclasses.replace(
            geometry, **{name: getattr(geometry, name)[..., 0] for name in ALIGNMENT_SCALARS}
        )
    return Decomposition(
        parallel=structure.unflatten(parallel),
        orthogonal=structure.unflatten(orthogonal),
        geometry=geometry,
    )
