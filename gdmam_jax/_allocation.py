"""The allocation: what weighting and gate decide for a step, and the link that applies it."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._checks import check_choice, check_chosen, check_losses, check_range, check_state
from gdmam_jax._gates import Gate, open_gate, priority_gate
from gdmam_jax._geometry import ALIGNMENT_SCALARS, Geometry, gramian, norms
from gdmam_jax._losses import Losses, Names, arranged, as_array, by_loss
from gdmam_jax._momenta import newest_share
from gdmam_jax._numerics import (
    narrow,
    pytree_dataclass,
    register_with_flax,
    where,
    wide_dtype,
    widen,
)
from gdmam_jax._pairs import GradientPair, begin_update, check_floating, halves
from gdmam_jax._remembering import RememberingWeighting, check_weighting, first_memory, weigh
from gdmam_jax._scopes import Scope, Scopes
from gdmam_jax._settings import chosen, default
from gdmam_jax._sharding import as_axis_names
from gdmam_jax._weightings import Weighting, unit_weighting

LARGEST_RATIO = 1e12
"""The largest ratio of the weighed norms that a gate is given."""


@pytree_dataclass
class Allocation:
    """What one step decided: the state of `allocate`, and a part of every other state.

    There are K losses, with the prediction first, and J = K - 1 alignment losses. With several
    scopes, arrays have a leading axis over them. Arrays are float32, or float64 if a parameter is.

    Attributes:
      geometry: norms, cosines and projections of the step; zeros before the first, and for a loss
        that was absent.
      norms: running means of the gradients' norms, bias-corrected; shape ``(..., K)``.
      remainder: product of the running means' decays so far, 1 at first; shape ``(K,)``.
      weights: the tasks' weights; shape ``(..., K)``.
      gate: factors of each alignment gradient's (parallel, orthogonal) part; shape ``(..., 2, J)``.
      memory: the state of a weighting that has one, or None.
      skipped: steps left out so far; int32, shape ``()``; None if every step is taken.
      skipped_in_a_row: steps in a row that were not finite, also those taken after ``max_skips``;
        likewise.
      skipped_losses: how often each loss was left out for not being finite; int32, shape ``(K,)``;
        None without ``not_finite="skip_loss"``.
      scopes: the names of the scopes; static.
      names: the names of the alignment losses, empty for one without a name; static.
    """

    geometry: Geometry
    norms: jax.Array
    remainder: jax.Array
    weights: jax.Array
    gate: jax.Array
    memory: Any
    skipped: Any
    skipped_in_a_row: Any
    skipped_losses: Any
    scopes: Scopes
    names: Names

    @property
    def components(self) -> jax.Array:
        """The allocated components as combinations of the gradients: shape ``(..., 1 + 2J, K)``."""
        projection = self.geometry.projection
        alignment = self.weights[..., None, 1:] * self.gate
        parallel, orthogonal = alignment[..., 0, :], alignment[..., 1, :]
        along = jnp.concatenate(
            [self.weights[..., :1], parallel * projection, -orthogonal * projection], axis=-1
        )
        losses = orthogonal.shape[-1]
        own = jnp.eye(losses, dtype=along.dtype).reshape(*[1] * (along.ndim - 1), losses, losses)
        across = orthogonal[..., None] * own
        nothing = jnp.zeros((*along.shape[:-1], 1 + losses, losses), along.dtype)
        return jnp.concatenate(
            [along[..., None], jnp.concatenate([nothing, across], axis=-2)], axis=-1
        )

    @property
    def factors(self) -> jax.Array:
        """The allocated gradient as a combination of the gradients: shape ``(..., K)``."""
        return jnp.sum(self.components, axis=-2)

    @property
    def sizes(self) -> jax.Array:
        """The norms of the allocated components, shape ``(..., 1 + 2J)``."""
        geometry = self.geometry
        parts = jnp.stack([geometry.parallel_norm, geometry.orthogonal_norm], axis=-2)
        parts = self.weights[..., None, 1:] * self.gate * parts
        prediction = self.weights[..., :1] * geometry.prediction_norm[..., None]
        return jnp.abs(jnp.concatenate([prediction, parts[..., 0, :], parts[..., 1, :]], axis=-1))


@dataclasses.dataclass(frozen=True)
class Allocator:
    """The choices of an allocation, and how they decide a step.

    The fields are the arguments of `allocate`, and ``floor``, which the released form adds to every
    norm.
    """

    weighting: Weighting | RememberingWeighting
    gate: Gate = open_gate
    scope: Scope | None = None
    alignment_losses: int | Sequence[str] | None = None
    statistics_decay: Any = 0.9
    not_finite: str = "apply"
    max_skips: Any = None
    axis_name: str | Sequence[str] | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_weighting(self.weighting)
        check_chosen("gate", self.gate)
        if self.scope is not None:
            check_chosen("scope", self.scope)
        check_range("statistics_decay", self.statistics_decay, 0, 1, below_maximum=True)
        check_losses(self.alignment_losses)
        as_axis_names(self.axis_name)
        if self.not_finite not in ("apply", "skip", "skip_loss"):
            raise ValueError(
                f"not_finite must be 'apply', 'skip' or 'skip_loss', got {self.not_finite!r}"
            )
        check_range("max_skips", 0 if self.max_skips is None else self.max_skips, whole=True)
        if self.max_skips is not None and not self.skips:
            raise ValueError("max_skips needs not_finite='skip' or 'skip_loss'")

    @property
    def skips(self) -> bool:
        """Whether steps that are not finite are left out."""
        return self.not_finite != "apply"

    @property
    def losses(self) -> int | tuple[str, ...]:
        """How many alignment losses there are, or their names."""
        given = self.alignment_losses
        return 1 if given is None else given if isinstance(given, int) else tuple(given)

    @property
    def count(self) -> int:
        """How many alignment losses there are."""
        return self.losses if isinstance(self.losses, int) else len(self.losses)

    def init(self, params: Any) -> Allocation:
        """The allocation before the first step."""
        register_with_flax()
        check_floating(params, "parameter")
        scopes = Scopes.of(params, self.scope)
        dtype = wide_dtype(*jax.tree.leaves(params))
        count = self.count

        def zeros(*last: int) -> jax.Array:
            return jnp.zeros(scopes.shape + last, dtype)

        def counts(*shape: int, kept: bool) -> Any:
            return jnp.zeros(shape, jnp.int32) if kept else None

        return Allocation(
            geometry=Geometry(
                prediction_norm=zeros(), **{name: zeros(count) for name in ALIGNMENT_SCALARS}
            ),
            norms=zeros(1 + count),
            remainder=jnp.ones(1 + count, dtype),
            weights=zeros(1 + count),
            gate=zeros(2, count),
            memory=first_memory(self.weighting, zeros(1 + count)),
            skipped=counts(kept=self.skips),
            skipped_in_a_row=counts(kept=self.skips),
            skipped_losses=counts(1 + count, kept=self.not_finite == "skip_loss"),
            scopes=scopes,
            names=Names(() if isinstance(self.losses, int) else self.losses),
        )

    def begin(
        self,
        updates: optax.Updates,
        previous: Allocation,
        params: optax.Params | None,
        alignment: Any,
        like: Any = None,
    ) -> tuple[list[GradientPair], Any, Allocation]:
        """What every update does first: takes the pairs as they are given, and checks them.

        Returns:
          The pairs in a list, with the alignment gradients in the losses' order; the structure of
          their tree; ``previous`` with the losses' names.
        """
        leaves, structure = begin_update(updates, alignment, params, like)
        arranged_leaves, names = arranged(leaves, self.losses)
        scopes = Scopes.of(structure.unflatten(leaves), self.scope)
        shape = (*scopes.shape, 1 + self.count)
        if previous.scopes != scopes or previous.weights.shape != shape:
            raise ValueError(
                "the optimizer state was made with another scope or alignment_losses: it has "
                f"{previous.scopes} and weights of shape {previous.weights.shape}, this optimizer "
                f"{scopes} and {shape}; make a state with this optimizer's init"
            )
        zeros = jax.ShapeDtypeStruct(shape, previous.norms.dtype)
        memory = jax.eval_shape(functools.partial(first_memory, self.weighting), zeros)
        found: Any = jax.tree.structure(previous.memory)
        counts = (previous.skipped is not None, previous.skipped_losses is not None)
        check_choice("not_finite", counts == (self.skips, self.not_finite == "skip_loss"))
        check_choice("weighting", found == jax.tree.structure(memory))
        return arranged_leaves, structure, dataclasses.replace(previous, names=Names(names))

    def decide(
        self, leaves: Sequence[GradientPair], previous: Allocation, value: Any, present: Any
    ) -> tuple[Allocation, Any]:
        """Measures the pairs and decides weights and gate for this step.

        Args:
          leaves: the pairs, from `begin`.
          previous: the allocation of the step before, from `begin`.
          value: the losses' values, ``(prediction, alignment)``; None, or anything but a pair, if
            the weighting does not use them.
          present: which losses are present, a pair of booleans likewise; None for all.

        Returns:
          The allocation, and which losses count, ``(K,)``; None for all.
        """
        dtype = previous.norms.dtype
        products = gramian(leaves, previous.scopes, self.axis_name).astype(dtype)
        if present is not None:
            present = jnp.stack(
                [jnp.asarray(p, bool) for p in by_loss("present", present, self.losses)]
            )
        if self.not_finite == "skip_loss":
            finite = jnp.isfinite(jnp.diagonal(products, axis1=-2, axis2=-1))
            finite = jnp.all(finite.reshape(-1, finite.shape[-1]), axis=0)
            wanted = jnp.ones_like(finite) if present is None else present
            lost, present = wanted & ~finite, wanted & finite
            if self.max_skips is not None:
                # The failure shows in the step that is taken when no loss is finite.
                forced = (previous.skipped_in_a_row >= self.max_skips) & ~jnp.any(present)
                present = jnp.where(forced, wanted, present)
            previous = dataclasses.replace(
                previous,
                skipped_losses=jnp.where(
                    lost, optax.safe_increment(previous.skipped_losses), previous.skipped_losses
                ),
            )
        if present is not None:
            both = jnp.broadcast_to(jnp.outer(present, present), products.shape)
            products = jnp.where(both, products, 0)
        share, remainder = newest_share(previous.remainder, self.statistics_decay, present)
        share = jnp.broadcast_to(share, previous.norms.shape)
        means = previous.norms + share * (norms(products) - previous.norms)
        losses = Losses(previous.names.values, self._values(value, dtype), present)
        weights, memory = weigh(self.weighting, products, means, previous.memory, losses)
        weights = as_array("weighting", weights, means.shape, dtype, "weights")
        if present is not None:
            weights = jnp.where(jnp.broadcast_to(present, weights.shape), weights, 0)
        geometry = Geometry.of(products, self.floor)
        gate = gate_factors(self.gate, geometry, weights)
        decided = dataclasses.replace(
            previous,
            geometry=geometry,
            norms=means,
            remainder=remainder,
            weights=weights,
            gate=gate,
            memory=memory,
        )
        return decided, present

    def _values(self, value: Any, dtype: Any) -> jax.Array | None:
        # A scalar is meant for other links of the chain.
        if not isinstance(value, Sequence):
            return None
        values = by_loss("value", value, self.losses)
        return jnp.stack([jnp.asarray(each, dtype) for each in values])

    def keep(
        self, previous: Allocation, decided: Allocation, present: Any, more: Any = None
    ) -> tuple[Allocation, Any]:
        """Leaves out a step that is not finite, if ``not_finite`` asks for it.

        Args:
          previous: the allocation of the step before.
          decided: that of this step.
          present: which losses count, from `decide`.
          more: what else has to be finite.

        Returns:
          The allocation to go on with, and whether the step is taken; None if every step is.
        """
        if not self.skips:
            return decided, None
        # These are finite only if all elements of all gradients are: no pass over them is needed.
        numbers = [
            each
            for each in jax.tree.leaves((decided, more))
            if jnp.issubdtype(each.dtype, jnp.inexact)
        ]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(each)) for each in numbers]))
        if self.not_finite == "skip_loss":
            finite &= jnp.any(present)
        apply = finite
        if self.max_skips is not None:
            apply = finite | (previous.skipped_in_a_row >= self.max_skips)
        more_skips = optax.safe_increment
        return (
            dataclasses.replace(
                where(apply, decided, previous),
                skipped=jnp.where(apply, previous.skipped, more_skips(previous.skipped)),
                skipped_in_a_row=jnp.where(finite, 0, more_skips(previous.skipped_in_a_row)),
                skipped_losses=decided.skipped_losses,
            ),
            apply,
        )


def gate_factors(gate: Gate, geometry: Geometry, weights: jax.Array) -> jax.Array:
    """The factors of each alignment gradient's (parallel, orthogonal) part: ``(..., 2, J)``."""
    size_p = weights[..., :1] * geometry.prediction_norm[..., None]
    size_a = weights[..., 1:] * geometry.alignment_norm
    counts = size_p * LARGEST_RATIO > size_a
    ratio = jnp.where(counts, size_a / jnp.where(counts, size_p, 1), LARGEST_RATIO)
    parts = gate(geometry.cosine, ratio)
    return jnp.moveaxis(
        as_array("gate", parts, (*ratio.shape, 2), weights.dtype, "factors", stacked=True), -1, -2
    )


def allocate(
    weighting: Weighting | RememberingWeighting = default(unit_weighting),
    gate: Gate = default(priority_gate),
    *,
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    statistics_decay: Any = 0.9,
    not_finite: Literal["apply", "skip", "skip_loss"] = "apply",
    max_skips: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GDMAM in front of any optimizer: takes pairs, returns the allocated gradient.

    It splits the alignment gradient along and across the prediction gradient (see `decompose`).
    Weights and gate make one gradient of the parts:

    $$
    A = w_p g_p + w_a (v_\parallel g_\parallel + v_\perp g_\perp).
    $$

    ``optax.chain(gdmam.allocate(), optax.contrib.muon(1e-2))`` is GDMAM in front of Muon.

    Args:
      weighting: the tasks' weights: a function ``(gramian, norms) -> weights`` of the gradients'
        inner products and of the running means of their norms, with shapes ``(..., K, K)``,
        ``(..., K)`` and ``(..., K)``; index 0 is the prediction. Or a `RememberingWeighting`. In
        front of an optimizer without a second moment, such as SGD, choose one whose weights do not
        grow as gradients shrink, such as `config_weighting`.
      gate: the factors of the two parts of the alignment gradient: a function
        ``(cosine, ratio) -> (parallel, orthogonal)`` of the angle and of the weighed norms'
        ratio.
      scope: what is decomposed together: a function from a leaf's path, such as
        ``"encoder/kernel"``, to a label, for example `leaf_scope`. None: all leaves together.
      alignment_losses: how many alignment losses there are; or the names of those that the loss
        function returns in a dictionary, in the order in which weights are given. None: one.
      statistics_decay: decay of the norms' running means, in [0, 1).
      not_finite: what happens to a step in which an inner product of the gradients, or a number
        made of them, is not finite.
        ``"apply"``: the step is taken, and NaN and infinity spread, as in Optax's own optimizers.
        ``"skip"``: the result is 0 and the state stays the same bit for bit, except for counts
        that `diagnostics` shows. Other links of a chain still run. ``"skip_loss"``: a loss whose
        gradient is not finite counts as absent from this step, and the others go on; if no loss is
        left, the step is left out.
      max_skips: after this many steps left out in a row those that follow are taken, finite or
        not, until one is finite, so that the failure shows. None: never.
      axis_name: inside `jax.shard_map`, the mesh axes over which parameters are sharded: the inner
        products are summed over them.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and returns one gradient, of the gradients'
      dtypes. It also takes ``present=``, booleans like the losses, ``(prediction, alignment)``: an
      absent loss has no weight and keeps its running means; and ``value=``, the losses'
      values, for weightings that look at them. Its state is an `Allocation`.

    Raises:
      ValueError: a number is out of range or narrower than float32, ``not_finite`` or
        ``alignment_losses`` is not valid, or ``max_skips`` is given without ``"skip"``. While
        tracing: pairs whose halves differ, a structure or shape other than the parameters', a state
        that was made with other choices, or ``value_fn=`` of a line search.
      TypeError: a choice is not a function, or a setting not a number. While tracing: an update
        that is not a `GradientPair`, or a parameter or gradient that is not floating-point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = optax.chain(gdmam.allocate(), optax.sgd(0.1))
      >>> w = jnp.zeros(2)
      >>> pair = gdmam.GradientPair(jnp.array([2.0, 0.0]), jnp.array([0.0, 0.1]))
      >>> updates, state = optimizer.update(pair, optimizer.init(w), w)
      >>> updates
      Array([-0.1, -0.1], dtype=float32)

    References:
      The method's public description, made precise. The project's documentation says which parts
      are released code and which are this library's reading.
    """
    allocator = Allocator(
        weighting=chosen(weighting),
        gate=chosen(gate),
        scope=scope,
        alignment_losses=alignment_losses,
        statistics_decay=statistics_decay,
        not_finite=not_finite,
        max_skips=max_skips,
        axis_name=axis_name,
    )

    def update(
        updates: optax.Updates,
        state: Allocation,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        value: Any = None,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Allocation]:
        check_state(state, Allocation)
        if "value_fn" in extra_args:
            raise ValueError(
                "a line search behind allocate would search a function other than the one whose "
                "gradient it is given; write weighed(optax.lbfgs(), weighting) instead, and pass "
                "the losses as value=, the pairs as grad= and the loss function as value_fn="
            )
        leaves, structure, previous = allocator.begin(updates, state, params, alignment)
        if not leaves:
            return structure.unflatten([]), state
        decided, present = allocator.decide(leaves, previous, value, present)
        allocation, apply = allocator.keep(previous, decided, present)
        taken = taken_losses(apply, present, 1 + allocator.count)
        factors = decided.factors if apply is None else jnp.where(apply, decided.factors, 0)
        sums = [
            add_up(pair, decided.scopes.at(factors, number), taken)
            for number, pair in enumerate(leaves)
        ]
        return structure.unflatten(sums), allocation

    return optax.GradientTransformationExtraArgs(allocator.init, update)


def taken_losses(apply: Any, present: Any, count: int) -> Any:
    """Which losses a step takes: booleans of shape ``(K,)``, or None for all."""
    if apply is None:
        return present
    return jnp.broadcast_to(apply, count) if present is None else apply & present


def add_up(pair: GradientPair, weights: Any, taken: Any = None) -> jax.Array:
    """The sum of a pair's gradients times their weights, taken in float32 or better.

    Where ``taken`` is false a gradient is left out, whatever it holds.
    """
    wide = [widen(gradient) for gradient in halves(pair)]
    if taken is not None:
        wide = [jnp.where(taken[k], gradient, 0) for k, gradient in enumerate(wide)]
    terms = [jnp.asarray(weights[k], wide[0].dtype) * each for k, each in enumerate(wide)]
    return narrow(sum(terms[1:], terms[0]), jnp.result_type(pair.prediction))
