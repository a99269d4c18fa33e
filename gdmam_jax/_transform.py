"""The allocated form: weigh, gate, then remember, as an Optax transformation."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import Allocation, Allocator, taken_losses
from gdmam_jax._checks import check_choice, check_chosen, check_range, check_state
from gdmam_jax._gates import Gate, priority_gate
from gdmam_jax._losses import as_array
from gdmam_jax._momenta import MomentumRule, NormStatistics, constant_momentum
from gdmam_jax._numerics import (
    divide,
    floored_sqrt,
    map_leaves,
    narrow,
    pytree_dataclass,
    where,
    wide_dtype,
    wide_zeros_like,
    zeros_like,
)
from gdmam_jax._pairs import halves
from gdmam_jax._remembering import RememberingWeighting
from gdmam_jax._scopes import Scope
from gdmam_jax._settings import chosen, default
from gdmam_jax._weightings import Weighting, config_weighting


@pytree_dataclass
class GDMAMState:
    r"""State of `scale_by_gdmam`.

    Attributes:
      count: steps taken; int32, shape ``()``.
      allocation: what the last step decided; see `Allocation`.
      statistics: of the components' norms, and the step's momentum; see `NormStatistics`.
      momentum_correction: $1 - \prod_t \beta_t$ of each momentum, for the exact bias correction;
        kept as a running mean of 1, since the difference would lose digits; float32 or better,
        shape ``(1,)`` with steered momenta, ``(3,)`` with separate ones, after the scopes' axis.
      momenta: bias-corrected momenta, updated as such:
        $\hat m \leftarrow (1 - s) \hat m + s A$ with $s = (1 - \beta) / (1 - \prod_t \beta_t)$. A
        tuple of trees like the parameters, of their dtypes or ``mu_dtype``: one for the sum
        of the allocated components, or one for each of (prediction, parallel, orthogonal), the
        last two once for each alignment loss.
      second_moment: running mean of the square of the components' sum; a tree like the parameters,
        float32 or better; None without ``b2``.
      second_moment_maximum: its largest value so far, with ``amsgrad``; else None.
      second_moment_correction: $1 - \prod_t b_{2,t}$; shape ``()``; None without ``b2``.
    """

    count: jax.Array
    allocation: Allocation
    statistics: NormStatistics
    momentum_correction: jax.Array
    momenta: tuple[Any, ...]
    second_moment: Any
    second_moment_maximum: Any
    second_moment_correction: Any


def scale_by_gdmam(
    *,
    weighting: Weighting | RememberingWeighting = default(config_weighting),
    gate: Gate = default(priority_gate),
    momentum: MomentumRule = default(constant_momentum),
    momenta: Literal["steered", "separate"] = "steered",
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    statistics_decay: Any = 0.9,
    b2: Any = None,
    eps: Any = 1e-8,
    amsgrad: bool = False,
    mu_dtype: Any = None,
    not_finite: Literal["apply", "skip", "skip_loss"] = "apply",
    max_skips: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns pairs of gradients into one update: weighed, gated, then remembered.

    The alignment gradient is split along and across the prediction gradient (see `decompose`).
    Weights and gate make the three allocated components of the step:

    $$
    A_p = w_p g_p, \qquad A_\parallel = w_a v_\parallel g_\parallel, \qquad
    A_\perp = w_a v_\perp g_\perp.
    $$

    With ``momenta="steered"`` the update is the bias-corrected momentum of their sum. Its decay is
    the mean of the components' decays, weighted by their norms. With ``"separate"`` each component
    has a momentum, and the update is the sum of these. If all decays are equal, both are the same.

    With ``b2`` the update is divided by $\sqrt{v / (1 - \prod_t b_{2,t})} + \operatorname{eps}$,
    where $v$ is the running mean of the square of the components' sum.

    Every number is a scalar that `optax.inject_hyperparams` can inject or schedule.

    Args:
      weighting: see `allocate`. With the default, updates shrink as the gradients do; with ``b2``
        choose `unit_weighting`, as `gdmam` does.
      gate: see `allocate`.
      momentum: the momentum coefficients: a function ``statistics -> momentum``, for example
        `relative_momentum`.
      momenta: ``"steered"``, one buffer, or ``"separate"``, one for each component.
      scope: see `allocate`.
      alignment_losses: see `allocate`.
      statistics_decay: decay of the norms' running statistics, in [0, 1).
      b2: decay of the second moment, in [0, 1); None for no second moment.
      eps: added to the root of the second moment, above 0.
      amsgrad: divide by the largest second moment so far instead of the current one, as PyTorch
        does; Optax's is the largest after its bias is corrected.
      mu_dtype: dtype of the momenta; None: that of the parameters. Second moment and
        statistics are float32 or better in any case.
      not_finite: see `allocate`.
      max_skips: see `allocate`.
      axis_name: see `allocate`.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and returns updates of the parameters' dtypes.
      If ``update`` is not given the parameters, updates have the wider dtype of gradient and
      momentum. It takes ``present=`` and ``value=``, as `allocate` does.

    Raises:
      ValueError: a number is out of range or narrower than float32, ``momenta``, ``not_finite`` or
        ``alignment_losses`` is not valid, ``amsgrad`` is asked for without ``b2``, ``max_skips``
        without ``"skip"``, or ``mu_dtype`` is not floating-point. While tracing: pairs whose
        halves differ, a structure or shape other than the parameters', or a state that was made
        with other choices.
      TypeError: a choice is not a function, or a setting not a number. While tracing: an update
        that is not a `GradientPair`, or a parameter or gradient that is not floating-point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> def losses(w):
      ...     return jnp.sum((w - 1) ** 2), 0.1 * jnp.sum(w**2)
      >>> optimizer = optax.chain(gdmam.scale_by_gdmam(), optax.scale_by_learning_rate(0.1))
      >>> w = jnp.zeros(2)
      >>> state = optimizer.init(w)
      >>> _, pairs = gdmam.value_and_paired_grad(losses)(w)
      >>> updates, state = optimizer.update(pairs, state, w)
      >>> optax.apply_updates(w, updates)
      Array([0.2, 0.2], dtype=float32)

    References:
      The method's public description, made precise. The project's documentation says which parts
      are released code and which are this library's reading.
    """
    form = _Form(
        allocator=Allocator(
            weighting=chosen(weighting),
            gate=chosen(gate),
            scope=scope,
            alignment_losses=alignment_losses,
            statistics_decay=statistics_decay,
            not_finite=not_finite,
            max_skips=max_skips,
            axis_name=axis_name,
        ),
        momentum=chosen(momentum),
        momenta=momenta,
        b2=b2,
        eps=eps,
        amsgrad=amsgrad,
        mu_dtype=mu_dtype,
    )
    return optax.GradientTransformationExtraArgs(form.init, form.update)


@dataclasses.dataclass(frozen=True)
class _Form:
    """The allocated form with its choices: what `scale_by_gdmam` makes of its arguments."""

    allocator: Allocator
    momentum: MomentumRule
    momenta: str
    b2: Any
    eps: Any
    amsgrad: bool
    mu_dtype: Any

    def __post_init__(self) -> None:
        check_chosen("momentum", self.momentum)
        check_range("b2", 0 if self.b2 is None else self.b2, 0, 1, below_maximum=True)
        check_range("eps", self.eps, above_minimum=True)
        if self.momenta not in ("steered", "separate"):
            raise ValueError(f"momenta must be 'steered' or 'separate', got {self.momenta!r}")
        if self.amsgrad and self.b2 is None:
            raise ValueError("amsgrad=True needs a second moment: give b2, for example b2=0.999")
        if self.mu_dtype is not None and not _is_floating(self.mu_dtype):
            raise ValueError(
                f"mu_dtype must be a floating-point dtype, got {self.mu_dtype}; "
                "optax.inject_hyperparams treats a dtype as a schedule: give it "
                "static_args=('mu_dtype',)"
            )

    @property
    def steered(self) -> bool:
        """Whether there is one momentum for all components."""
        return self.momenta == "steered"

    def init(self, params: optax.Params) -> GDMAMState:
        """The state before the first step."""
        allocation = self.allocator.init(params)
        statistics = NormStatistics.start(allocation.sizes.shape, allocation.norms.dtype)
        decays = statistics.mean[..., : 1 if self.steered else None]
        has_second = self.b2 is not None
        return GDMAMState(
            count=jnp.zeros((), jnp.int32),
            allocation=allocation,
            statistics=statistics,
            momentum_correction=jnp.zeros_like(decays),
            momenta=tuple(zeros_like(params, self.mu_dtype) for _ in range(decays.shape[-1])),
            second_moment=wide_zeros_like(params) if has_second else None,
            second_moment_maximum=wide_zeros_like(params) if self.amsgrad else None,
            second_moment_correction=jnp.zeros((), decays.dtype) if has_second else None,
        )

    def update(
        self,
        updates: optax.Updates,
        state: GDMAMState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        value: Any = None,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GDMAMState]:
        """Takes pairs, and returns one update and the new state."""
        del extra_args
        check_state(state, GDMAMState)
        leaves, structure, previous = self.allocator.begin(
            updates, state.allocation, params, alignment, like=state.momenta[0]
        )
        check_choice("momenta", (len(state.momenta) == 1) == self.steered)
        check_choice("b2", (state.second_moment is not None) == (self.b2 is not None))
        check_choice("amsgrad", (state.second_moment_maximum is not None) == self.amsgrad)
        if not leaves:
            return structure.unflatten([]), state
        allocation, present = self.allocator.decide(leaves, previous, value, present)
        statistics = self.measured(state.statistics, allocation, present)
        small, per_scope, second = self.remember(state, allocation, statistics)
        allocation, apply = self.allocator.keep(previous, allocation, present, statistics)
        if apply is not None:
            small = where(apply, small, {name: getattr(state, name) for name in small})
            # With these scalars the loops over the arrays leave them unchanged.
            per_scope = jax.tree.map(lambda scalar: jnp.where(apply, scalar, 0), per_scope)
            second = second and (jnp.where(apply, second[0], 1), *second[1:])
        taken = taken_losses(apply, present, 1 + self.allocator.count)
        dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]

        def leaf_step(number: int, moment: Any, largest: Any, *old: Any) -> Any:
            gradients = halves(leaves[number])
            with jax.numpy_dtype_promotion("standard"):
                dtype = dtypes[number] if dtypes else jnp.result_type(gradients[0], old[0])
            scalars = tuple(allocation.scopes.at(each, number) for each in per_scope)
            return _leaf_step(
                gradients, scalars, old, moment, largest, second, taken, apply,
                dtype=jnp.dtype(dtype),
            )  # fmt: skip

        direction, momenta, moment, largest = map_leaves(
            leaf_step,
            structure,
            state.second_moment,
            state.second_moment_maximum,
            *state.momenta,
        )
        new = {"second_moment": moment, "second_moment_maximum": largest, "momenta": momenta}
        return direction, GDMAMState(allocation=allocation, **new, **small)

    def measured(self, old: NormStatistics, allocation: Allocation, present: Any) -> NormStatistics:
        """The statistics after this step's components, and the momentum the rule makes of them."""
        if present is not None:
            present = jnp.concatenate([present[:1], present[1:], present[1:]])
        statistics = old.after(allocation.sizes, self.allocator.statistics_decay, present)
        coefficients = as_array(
            "momentum", self.momentum(statistics), old.mean.shape, old.mean.dtype, "coefficients"
        )
        return dataclasses.replace(statistics, momentum=coefficients)

    def remember(
        self, state: GDMAMState, allocation: Allocation, statistics: NormStatistics
    ) -> tuple[dict[str, Any], tuple[jax.Array, ...], Any]:
        """The scalars by which a step updates its momenta: the state's, and those of the leaves.

        Returns:
          The state's new scalars by name; `_leaf_step`'s ``scalars`` and ``second_scalars``.
        """
        decays, factors = statistics.momentum, allocation.components
        if self.steered:
            sizes = allocation.sizes
            total = jnp.sum(sizes, axis=-1, keepdims=True)
            sizes = jnp.where(total > 0, divide(sizes, total), 1 / sizes.shape[-1])
            decays = jnp.sum(sizes * decays, axis=-1, keepdims=True)
            factors = jnp.sum(factors, axis=-2, keepdims=True)
        correction = decays * state.momentum_correction + (1 - decays)
        # The newest gradient's share of a bias-corrected momentum.
        share = (1 - decays) / correction
        second, second_correction = None, None
        if self.b2 is not None:
            decay = jnp.asarray(self.b2, share.dtype)
            second_correction = decay * state.second_moment_correction + (1 - decay)
            root = jnp.sqrt(second_correction)
            second = (decay, root, root * jnp.asarray(self.eps, root.dtype))
        small = {
            "count": optax.safe_increment(state.count),
            "statistics": statistics,
            "momentum_correction": correction,
            "second_moment_correction": second_correction,
        }
        return small, (share, share[..., None] * factors, jnp.sum(factors, axis=-2)), second


def _is_floating(dtype: Any) -> bool:
    try:
        return not isinstance(dtype, jax.Array) and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # no dtype at all
        return False


# One compiled function for a leaf's step: leaves of equal shape are traced once.
@partial(jax.jit, static_argnames="dtype")
def _leaf_step(
    gradients: list[Any],
    scalars: tuple[jax.Array, jax.Array, jax.Array],
    momenta: tuple[jax.Array, ...],
    second: jax.Array | None,
    largest: jax.Array | None,
    second_scalars: tuple[jax.Array, jax.Array, jax.Array] | None,
    taken: jax.Array | None,
    apply: jax.Array | None,
    *,
    dtype: Any,
) -> tuple[Any, ...]:
    """A leaf's update and its new buffers.

    ``scalars`` are the newest components' shares of the momenta, ``(M,)``; these shares times the
    components' factors of the gradients, ``(M, K)``; and the factors of the components' sum,
    ``(K,)``. ``second_scalars`` are b2, the root of its correction, and that root times eps.
    ``taken`` says which gradients count; None: all. ``apply`` says whether the step is taken; None:
    it is.
    """
    precision = wide_dtype(*gradients, *momenta, *(() if second is None else [second]))
    wide = [jnp.asarray(gradient).astype(precision) for gradient in gradients]
    if taken is not None:
        wide = [jnp.where(taken[k], gradient, 0) for k, gradient in enumerate(wide)]
    share, share_of, factors = (scalar.astype(precision) for scalar in scalars)

    def combined(weights: jax.Array) -> jax.Array:
        terms = [weights[k] * gradient for k, gradient in enumerate(wide)]
        return sum(terms[1:], terms[0])

    new = [
        (1 - share[m]) * old.astype(precision) + combined(share_of[m])
        for m, old in enumerate(momenta)
    ]
    direction = sum(new[1:], new[0])
    if second is not None and second_scalars is not None:
        b2, root, root_eps = (scalar.astype(precision) for scalar in second_scalars)
        second = (b2 * second + (1 - b2) * combined(factors) ** 2).astype(second.dtype)
        largest = None if largest is None else jnp.maximum(largest, second)
        # u / (sqrt(v) / root + eps), with one division an element.
        denominator = floored_sqrt(second if largest is None else largest) + root_eps
        direction = root * direction / denominator
    if apply is not None:
        direction = jnp.where(apply, direction, 0)
    stored = tuple(narrow(each, old.dtype) for each, old in zip(new, momenta, strict=True))
    return narrow(direction, dtype), stored, second, largest
