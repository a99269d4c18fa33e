"""The geometry of two gradients: norms, angle, and the split of one along and across the other."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from gdmam_jax._dataclass import pytree_dataclass
from gdmam_jax.pairs import GradientPair, check_pairs, is_pair, named_leaves

EPS = 1e-12
"""Added to every norm, so that nothing divides by zero."""

# Below this squared sine, |g_a|^2 - <g_a, g_p>^2 / |g_p|^2 loses more than two digits.
_NEARLY_PARALLEL = 0.01

Scope = Callable[[str], Hashable]


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
    def of(cls, tree: Any, scope: Scope | None, is_leaf: Any = None) -> "Scopes":
        """Labels the leaves of ``tree`` by ``scope`` of their paths."""
        if scope is None:
            return cls()
        names = [str(scope(name)) for name, _ in named_leaves(tree, is_leaf=is_leaf)]
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

    def total(self, terms: Sequence[Sequence[jax.Array]]) -> jax.Array:
        """Adds the same number of scalars from each leaf up, to one of each for every scope."""
        groups: list[list[Sequence[jax.Array]]] = [[] for _ in range(max(1, len(self.labels)))]
        for position, scalars in enumerate(terms):
            groups[self.index[position] if self.index else 0].append(scalars)
        totals = [_sum_in_pairs(group) for group in groups]
        return jnp.stack(totals, axis=-1) if self.labels else totals[0]

    def at(self, scalars: jax.Array, leaf: int) -> jax.Array:
        """The entry of ``scalars``, one per scope, that leaf number ``leaf`` goes by."""
        return scalars[self.index[leaf]] if self.index else scalars


def _sum_in_pairs(rows: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """Adds rows of scalars in pairs: rounding and the program grow with the logarithm."""
    total = jnp.stack([scalar for row in rows for scalar in row]).reshape(len(rows), -1)
    while len(total) > 1:
        half = len(total) // 2
        total = jnp.concatenate([total[:half] + total[half : 2 * half], total[2 * half :]])
    return total[0]


@pytree_dataclass
class Geometry:
    r"""The scalars of a pair of gradients, one of each per scope.

    With $\epsilon = 10^{-12}$, all float32, or float64 where a gradient is, shape ``()`` or
    ``(scopes,)``:

    Attributes:
      prediction_norm: $n_p = |g_p| + \epsilon$.
      alignment_norm: $n_a = |g_a| + \epsilon$.
      parallel_norm: $n_\parallel = |c| |g_p| + \epsilon$.
      orthogonal_norm: $n_\perp = |g_a - c g_p| + \epsilon$.
      projection: $c = \langle g_a, g_p\rangle / n_p^2$, 0 where $g_p = 0$.
      cosine: $\langle g_a, g_p\rangle / (n_a n_p)$, between -1 and 1.
    """

    prediction_norm: jax.Array
    alignment_norm: jax.Array
    parallel_norm: jax.Array
    orthogonal_norm: jax.Array
    projection: jax.Array
    cosine: jax.Array

    @property
    def gate(self) -> jax.Array:
        """The released gate: the cosine, clipped to [0, 1]."""
        return jnp.clip(self.cosine, 0, 1)

    @property
    def prediction_weight(self) -> jax.Array:
        """The released weight of the prediction task: ``n_p / (n_p + n_a)``."""
        return self.prediction_norm / (self.prediction_norm + self.alignment_norm)

    @property
    def alignment_weight(self) -> jax.Array:
        """The released weight of the alignment task: ``n_a / (n_p + n_a)``."""
        return self.alignment_norm / (self.prediction_norm + self.alignment_norm)


@pytree_dataclass
class Decomposition:
    """What `decompose` returns.

    Attributes:
      parallel: the alignment gradient's part along the prediction gradient; a tree like the
        parameters, each leaf with its gradient's dtype.
      orthogonal: its part across the prediction gradient; likewise.
      geometry: the scalars, see `Geometry`.
    """

    parallel: Any
    orthogonal: Any
    geometry: Geometry


def widen(x: Any) -> jax.Array:
    """``x`` in float32 or better, the precision in which inner products and updates are taken."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def zeros_like(tree: Any, dtype: Any = None) -> Any:
    """Zeros of the leaves' shapes and shardings, the latter also where a compiled ``init`` runs.

    There zeros that depend on nothing would be left on one device by XLA; a comparison that no
    number passes depends on the leaf.
    """

    def zeros(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.core.Tracer):
            return (leaf > jnp.inf).astype(dtype or leaf.dtype)
        return jnp.zeros_like(leaf, dtype=dtype)

    return jax.tree.map(zeros, tree)


def measure(
    leaves: Sequence[GradientPair], scopes: Scopes, axis_name: str | Sequence[str] | None = None
) -> Geometry:
    """The geometry of a list of pairs, in one pass over memory where that is accurate.

    Three sums of products over both gradients give everything, in the usual case. A branch of the
    compiled step is for the rest: where some scope's gradients are parallel to within six degrees,
    the orthogonal norm would come from a difference of nearly equal numbers, and is taken from the
    residual; where a sum overflows, all are taken again, of gradients scaled by a power of two.

    Args:
      leaves: the pairs, in the order of ``scopes``.
      scopes: which leaf belongs to which scope.
      axis_name: inside `jax.shard_map`, the mesh axes over which the gradients are sharded. A leaf
        that is whole on some of them counts once there; with ``check_vma=False`` shards cannot be
        told from copies, and every leaf must be sharded over all of them.

    Returns:
      The scalars, one per scope.
    """
    names = _axis_names(axis_name)
    mesh = _explicit_mesh(leaves)
    if not names and mesh is not None:
        # Shardings are known here: add up the leaves on each device, and send three numbers once.
        specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, list(leaves))
        local = functools.partial(measure, scopes=scopes, axis_name=mesh.axis_names)
        return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P())(list(leaves))
    return _measure(list(leaves), scopes.labels, scopes.index, names)


def _axis_names(axis_name: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


# Compiled, so that a step that is not pays for tracing and compiling the branches only once.
@jax.jit(static_argnames=("labels", "index", "axis_names"))
def _measure(
    leaves: list[GradientPair],
    labels: tuple[str, ...],
    index: tuple[int, ...],
    axis_names: tuple[str, ...],
) -> Geometry:
    leaves = leaves or [GradientPair(jnp.zeros(0), jnp.zeros(0))]
    scopes = Scopes(labels, index)
    across = _Across(leaves, axis_names)

    def all_sum(terms: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        totals = scopes.total([[across.share(term) for term in leaf] for leaf in terms])
        return jax.lax.psum(totals, across.axes) if across.axes else totals

    sums = all_sum([_products(pair) for pair in leaves])

    def careful() -> tuple[jax.Array, jax.Array, jax.Array]:
        finite = jnp.isfinite(sums[:2])
        scales = jnp.where(finite, 1, _scale_down(sums.dtype)).astype(sums.dtype)
        numbers = range(len(leaves))

        def scaled(number: int) -> GradientPair:
            return _scaled(leaves[number], *(scopes.at(scale, number) for scale in scales))

        products = jax.lax.cond(
            jnp.all(finite),
            lambda: sums,
            lambda: all_sum([_products(scaled(number)) for number in numbers]),
        )
        ratio = _divide(products[2], products[0])
        terms = [_squared_residual(scaled(i), scopes.at(ratio, i)) for i in numbers]
        return products, all_sum([(term,) for term in terms])[0], scales

    squared_p, squared_a, product = sums
    difference = squared_a - _divide(product, safe_sqrt(squared_p)) ** 2
    accurate = (squared_p == 0) | (squared_a == 0) | (difference > _NEARLY_PARALLEL * squared_a)
    (squared_p, squared_a, product), squared_orthogonal, (scale_p, scale_a) = jax.lax.cond(
        jnp.all(accurate & jnp.isfinite(sums)),
        lambda: (sums, difference, jnp.ones_like(sums[:2])),
        careful,
    )
    root_p, root_a = safe_sqrt(squared_p), safe_sqrt(squared_a)
    root_orthogonal = safe_sqrt(squared_orthogonal)
    along = _divide(product, root_p)
    cosine = _divide(along, root_a)
    norm_p, norm_a = _scale_up(root_p, scale_p), _scale_up(root_a, scale_a)
    n_p, n_a = norm_p + EPS, norm_a + EPS
    limit = jnp.finfo(n_p.dtype).max / 8
    projection = cosine * (norm_p / n_p) * jnp.minimum(norm_a / n_p, limit)
    return Geometry(
        prediction_norm=n_p,
        alignment_norm=n_a,
        parallel_norm=jnp.abs(projection) * norm_p + EPS,
        orthogonal_norm=_scale_up(root_orthogonal, scale_a) + EPS,
        projection=projection,
        cosine=jnp.clip(cosine * (norm_a / n_a) * (norm_p / n_p), -1, 1),
    )


# What is done to each leaf is a compiled function: leaves of one shape are traced once.


@jax.jit
def _products(pair: GradientPair) -> tuple[jax.Array, jax.Array, jax.Array]:
    prediction, alignment = widen(pair.prediction), widen(pair.alignment)
    return (
        jnp.sum(prediction * prediction),
        jnp.sum(alignment * alignment),
        jnp.sum(alignment * prediction),
    )


@jax.jit
def _scaled(pair: GradientPair, prediction: jax.Array, alignment: jax.Array) -> GradientPair:
    return GradientPair(prediction * widen(pair.prediction), alignment * widen(pair.alignment))


@jax.jit
def _squared_residual(pair: GradientPair, ratio: jax.Array) -> jax.Array:
    return jnp.sum(split(pair, ratio)[1] ** 2)


def _scale_down(dtype: Any) -> float:
    """A power of two that brings all numbers of ``dtype`` within reach of a sum of squares."""
    return 2.0 ** -(3 * jnp.finfo(dtype).maxexp // 4)


def _scale_up(norm: jax.Array, scale: jax.Array) -> jax.Array:
    """``norm / scale``, cut at an eighth of the dtype's largest number; no number stays none."""
    limit = jnp.finfo(norm.dtype).max / 8
    return jnp.where(jnp.isfinite(norm), jnp.minimum(norm, limit * scale) / scale, jnp.nan)


def _explicit_mesh(leaves: Sequence[GradientPair]) -> Any:
    """The mesh that all leaves lie on, where their types tell how; else None."""
    shardings = [jax.typeof(leaf).sharding for leaf in jax.tree.leaves(list(leaves))]
    meshes = {sharding.mesh for sharding in shardings}
    mesh = meshes.pop() if len(meshes) == 1 else None
    return mesh if mesh is not None and mesh.shape and mesh.are_all_axes_explicit else None


class _Across:
    """Sums over shards inside `jax.shard_map`, in which what several shards hold counts once."""

    def __init__(self, leaves: Sequence[GradientPair], names: tuple[str, ...]):
        # check_vma=False: nothing is known to vary, not even the index along the axis itself.
        self.known = {name for name in names if name in _varying(jax.lax.axis_index(name))}
        varied = frozenset().union(*map(_varying, jax.tree.leaves(list(leaves)))) if names else ()
        self.axes = tuple(name for name in names if name in varied or name not in self.known)

    def _whole(self, x: jax.Array) -> tuple[str, ...]:
        return tuple(name for name in self.axes if name in self.known - _varying(x))

    def spread(self, x: jax.Array) -> jax.Array:
        """``x`` as a value that each shard has its own of."""
        whole = self._whole(x)
        return jax.lax.pcast(x, whole, to="varying") if whole else x

    def share(self, term: jax.Array) -> jax.Array:
        """What one shard adds to the sum of ``term`` over the axes."""
        copies = math.prod(jax.lax.axis_size(name) for name in self._whole(term))
        return self.spread(term if copies == 1 else term / copies)


def _varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which ``x`` is known to differ, inside `jax.shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def safe_sqrt(x: jax.Array) -> jax.Array:
    """Square root of ``max(x, 0)`` whose derivative at 0 is 0."""
    positive = x > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)
    return jnp.where(jnp.isnan(x), x, root)


def floored_sqrt(x: jax.Array) -> jax.Array:
    """Square root of the larger of ``x`` and the smallest normal number: 1e-19 at 0, in float32.

    Its derivative at 0 is 0 too. XLA repeats what precedes a loop's scalars in every loop, but
    nothing from before a root: `safe_sqrt`, which looks at ``x`` again, would let it through.
    """
    return jnp.sqrt(jnp.maximum(x, jnp.finfo(x.dtype).tiny))


@jax.jit
def norm(leaves: list[Any]) -> jax.Array:
    """The Euclidean norm over all leaves together, also where a sum of squares would overflow."""
    leaves = leaves or [jnp.zeros(0)]

    def squared(scale: Any) -> jax.Array:
        return _sum_in_pairs([[jnp.sum((scale * widen(leaf)) ** 2)] for leaf in leaves])[0]

    total = squared(1)
    scale = jnp.asarray(_scale_down(total.dtype), total.dtype)
    return jax.lax.cond(
        jnp.isfinite(total),
        lambda: safe_sqrt(total),
        lambda: _scale_up(safe_sqrt(squared(scale)), scale),
    )


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` in ``dtype``, cut at its largest number where that is smaller."""
    if x.dtype == dtype:
        return x
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit).astype(dtype)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """``x / y``, 0 where ``y`` is 0."""
    zero = y == 0
    return jnp.where(zero, 0, x / jnp.where(zero, 1, y))


def split(pair: GradientPair, projection: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The parallel and the orthogonal part of one pair's alignment gradient, widened."""
    parallel = projection * widen(pair.prediction)
    return parallel, widen(pair.alignment) - parallel


def decompose(
    pairs: optax.Updates,
    *,
    scope: Scope | None = None,
    axis_name: str | Sequence[str] | None = None,
) -> Decomposition:
    r"""Splits the alignment gradient along and across the prediction gradient.

    $$
    g_\parallel = \frac{\langle g_a, g_p\rangle}{n_p^2} g_p, \qquad
    g_\perp = g_a - g_\parallel, \qquad n_p = |g_p| + 10^{-12},
    $$

    where the inner product runs over all leaves of a scope together. Jit-compiled.

    Args:
      pairs: a tree of `GradientPair`, floating-point.
      scope: a function of a leaf's path, such as ``"encoder/kernel"``, to the label of the scope
        it is decomposed in, for example `leaf_scope`; None takes all leaves together.
      axis_name: inside `jax.shard_map`, the mesh axes over which the gradients are sharded.

    Returns:
      A `Decomposition`. Its parts add up to the alignment gradient to rounding, and the
      orthogonal part's inner product with the prediction gradient is 0 to rounding of
      $|g_a| |g_p|$. Inner products accumulate in float32 or better. Elements below about
      1e-19 (in float32) do not count in a norm; norms beyond an eighth of the dtype's largest
      number are cut there.

    Raises:
      TypeError: a leaf is not a pair of floating-point arrays.
      ValueError: the two halves of a pair differ in shape or dtype.

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
    return _decompose(pairs, scope, _axis_names(axis_name))


@jax.jit(static_argnames=("scope", "axis_names"))
def _decompose(
    pairs: optax.Updates, scope: Scope | None, axis_names: tuple[str, ...]
) -> Decomposition:
    leaves: list[GradientPair]
    structure: Any
    leaves, structure = jax.tree.flatten(pairs, is_leaf=is_pair)
    scopes = Scopes.of(pairs, scope, is_leaf=is_pair)
    geometry = measure(leaves, scopes, axis_names)
    parts = [
        [
            narrow(part, jnp.result_type(pair.alignment))
            for part in split(pair, scopes.at(geometry.projection, i))
        ]
        for i, pair in enumerate(leaves)
    ]
    return Decomposition(
        parallel=structure.unflatten([parallel for parallel, _ in parts]),
        orthogonal=structure.unflatten([orthogonal for _, orthogonal in parts]),
        geometry=geometry,
    )
