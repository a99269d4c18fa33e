"""The allocated form: three momenta, weighed, as an Optax transformation."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._checks import check_ordered, check_range
from gdmam_jax._dataclass import pytree_dataclass
from gdmam_jax.allocation import (
    Allocation,
    Gate,
    MomentumRule,
    Weighting,
    allocate,
    cosine_gate,
    init_allocation,
    norm_weighting,
    ratcheted_momentum,
)
from gdmam_jax.geometry import Scope, floored_sqrt, narrow, split, widen, zeros_like
from gdmam_jax.pairs import (
    GradientPair,
    as_pairs,
    check_floating,
    check_pairs,
    check_structure,
    is_pair,
)


@pytree_dataclass
class GDMAMState:
    r"""State of `scale_by_gdmam`.

    Attributes:
      count: steps taken; int32, shape ``()``.
      allocation: the norms' statistics and what the last step decided; see `Allocation`.
      momentum_correction: $c_k = 1 - \prod_t \beta_{k,t}$ of the three components, for the exact
        bias correction; kept as the running mean of 1, since the difference would cancel; float32
        or better, shape ``(3,)`` or ``(scopes, 3)``.
      prediction: bias-corrected momentum of the prediction gradient, $\hat m_p$, updated as such:
        $\hat m_k \leftarrow (1 - s_k) \hat m_k + s_k g_k$ with $s_k = (1 - \beta_k) / c_k$; a tree
        like the parameters, of their dtypes or ``momentum_dtype``.
      parallel: $\hat m_\parallel$, of the alignment gradient's parallel part; likewise.
      orthogonal: $\hat m_\perp$, of its orthogonal part; likewise.
      second_moment: running mean of the squared step; a tree like the parameters, float32 or
        better; None without ``b2``.
      second_moment_maximum: its largest value so far, with ``amsgrad``; else None.
      second_moment_correction: $1 - \prod_t b_{2,t}$; shape ``()``; None without ``b2``.
    """

    count: jax.Array
    allocation: Allocation
    momentum_correction: jax.Array
    prediction: Any
    parallel: Any
    orthogonal: Any
    second_moment: Any
    second_moment_maximum: Any
    second_moment_correction: Any


def check_momentum_hyperparameters(
    initial_momentum: Any,
    minimum_momentum: Any,
    maximum_momentum: Any,
    sensitivity: Sequence[Any],
    statistics_decay: Any,
) -> None:
    """Range checks of the numbers that both forms have."""
    check_range("minimum_momentum", minimum_momentum, 0, 1, below_maximum=True)
    check_range("maximum_momentum", maximum_momentum, 0, 1, below_maximum=True)
    check_ordered("minimum_momentum", minimum_momentum, "maximum_momentum", maximum_momentum)
    check_range("initial_momentum", initial_momentum, 0, 1, below_maximum=True)
    check_range("statistics_decay", statistics_decay, 0, 1, below_maximum=True)
    for name, value in zip(("prediction", "parallel", "orthogonal"), sensitivity, strict=True):
        check_range(f"{name}_sensitivity", value)


def scale_by_gdmam(
    *,
    weighting: Weighting | None = None,
    gate: Gate | None = None,
    momentum: MomentumRule | None = None,
    scope: Scope | None = None,
    initial_momentum: Any = 0.95,
    minimum_momentum: Any = 0.7,
    maximum_momentum: Any = 0.999,
    prediction_sensitivity: Any = None,
    parallel_sensitivity: Any = None,
    orthogonal_sensitivity: Any = None,
    statistics_decay: Any = 0.9,
    b2: Any = None,
    eps: Any = 1e-8,
    amsgrad: bool = False,
    momentum_dtype: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns pairs of gradients into one update, by GDMAM's allocated form.

    The alignment gradient is split along and across the prediction gradient (see `decompose`).
    Prediction, parallel and orthogonal part each have a momentum of their own, with a decay that
    depends on how noisy the part's norm is, and are weighed together:

    $$
    \begin{aligned}
    m_k &\leftarrow \beta_k m_k + (1 - \beta_k) g_k, \qquad
    \hat m_k = m_k / (1 - \textstyle\prod_t \beta_{k,t}), \\
    u &= w_p \hat m_p + w_a (v_\parallel \hat m_\parallel + v_\perp \hat m_\perp).
    \end{aligned}
    $$

    Without ``b2``, $u$ is the update. With it, $u$ is divided by
    $\sqrt{v / (1 - \prod_t b_{2,t})} + eps$, where $v$ follows the square of the same
    weighing of the raw components.

    Every number is a scalar that `optax.inject_hyperparams` can inject or schedule.

    Args:
      weighting: the tasks' weights from the two norms: a function
        ``(prediction_norm, alignment_norm) -> (prediction_weight, alignment_weight)``, for example
        `balanced_weighting`. None: `norm_weighting`.
      gate: the factors of the two parts of the alignment gradient: a function
        ``cosine -> (parallel, orthogonal)``, for example `conflict_gate`. None: `cosine_gate`.
      momentum: the momentum coefficients: a function
        ``(statistics, initial, sensitivity) -> momentum``, for example `relative_momentum`. None:
        `ratcheted_momentum`.
      scope: what is decomposed together: a function of a leaf's path, such as
        ``"encoder/kernel"``, to a label, for example `leaf_scope`. None: all leaves together.
      initial_momentum: $\beta_k$ before the first step, in [0, 1).
      minimum_momentum: lower bound of $\beta_k$, in [0, 1).
      maximum_momentum: upper bound of $\beta_k$, in [0, 1).
      prediction_sensitivity: how strongly noise lowers the prediction momentum, at least 0. None:
        the momentum rule's own.
      parallel_sensitivity: the same for the parallel part.
      orthogonal_sensitivity: the same for the orthogonal part.
      statistics_decay: decay of the norms' running statistics, in [0, 1).
      b2: decay of the second moment, in [0, 1); None for no second moment.
      eps: added to the root of the second moment, above 0.
      amsgrad: divide by the largest second moment so far instead of the current one.
      momentum_dtype: dtype of the three momenta; None: that of the parameters. Second moment and
        statistics are float32 or better in any case.
      axis_name: inside `jax.shard_map`, the mesh axes over which parameters are sharded: the inner
        products are summed over them.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and returns updates of the parameters' dtypes;
      where ``update`` is not given the parameters, of the wider of gradient and momentum.

    Raises:
      ValueError: a number is out of range or narrower than float32, ``amsgrad`` is asked for
        without ``b2``, or ``momentum_dtype`` is not floating-point. While tracing: pairs whose
        halves differ, or a structure or shape other than the parameters'.
      TypeError: a choice is no function. While tracing: an update that is not a `GradientPair`, or
        a parameter or gradient that is not floating-point.

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
      The method's public description, made precise; see the project's documentation for what of it
      is released code and what is this library's reading.
    """
    sensitivity = (prediction_sensitivity, parallel_sensitivity, orthogonal_sensitivity)
    check_momentum_hyperparameters(
        initial_momentum, minimum_momentum, maximum_momentum, sensitivity, statistics_decay
    )
    check_range("b2", 0 if b2 is None else b2, 0, 1, below_maximum=True)
    check_range("eps", eps, above_minimum=True)
    choices = {"weighting": weighting, "gate": gate, "momentum": momentum, "scope": scope}
    for name, choice in choices.items():
        if choice is not None and not callable(choice):
            raise TypeError(
                f"{name} must be a function, got {choice!r}; optax.inject_hyperparams takes "
                f"functions for schedules: give it static_args={tuple(choices)}"
            )
    if amsgrad and b2 is None:
        raise ValueError("amsgrad=True needs a second moment: give b2, for example b2=0.999")
    if momentum_dtype is not None and not jnp.issubdtype(momentum_dtype, jnp.floating):
        raise ValueError(f"momentum_dtype must be a floating-point dtype, got {momentum_dtype}")

    def init(params: optax.Params) -> GDMAMState:
        check_floating(params, "parameter")
        allocation = init_allocation(params, scope, initial_momentum)
        dtype = allocation.weights.dtype

        def second_moment() -> optax.Params:
            return zeros_like(jax.tree.map(widen, params))

        return GDMAMState(
            count=jnp.zeros((), jnp.int32),
            allocation=allocation,
            momentum_correction=jnp.zeros_like(allocation.statistics.momentum),
            prediction=zeros_like(params, momentum_dtype),
            parallel=zeros_like(params, momentum_dtype),
            orthogonal=zeros_like(params, momentum_dtype),
            second_moment=None if b2 is None else second_moment(),
            second_moment_maximum=second_moment() if amsgrad else None,
            second_moment_correction=None if b2 is None else jnp.zeros((), dtype),
        )

    def update(
        updates: optax.Updates,
        state: GDMAMState,
        params: optax.Params | None = None,
        *,
        alignment: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GDMAMState]:
        del extra_args
        pairs = as_pairs(updates, alignment)
        check_pairs(pairs, like=state.prediction)
        if params is not None:
            check_structure("params", params, state.prediction)
        leaves = jax.tree.leaves(pairs, is_leaf=is_pair)
        structure: Any = jax.tree.structure(state.prediction)
        allocation = allocate(
            leaves,
            state.allocation,
            weighting=weighting or norm_weighting,
            gate=gate or cosine_gate,
            momentum=momentum or ratcheted_momentum,
            initial_momentum=initial_momentum,
            minimum_momentum=minimum_momentum,
            maximum_momentum=maximum_momentum,
            sensitivity=sensitivity,
            statistics_decay=statistics_decay,
            axis_name=axis_name,
        )
        decays = allocation.statistics.momentum
        momentum_correction = decays * state.momentum_correction + (1 - decays)
        # The newest gradient's share of a bias-corrected momentum.
        shares = (1 - decays) / momentum_correction
        # What (prediction, parallel, orthogonal) count in the direction.
        factors = jnp.concatenate(
            [allocation.weights[..., :1], allocation.weights[..., 1:] * allocation.gate], axis=-1
        )
        # The same weighing of the raw components, as factors of the two gradients themselves.
        projection = allocation.geometry.projection
        along = factors[..., 0] + (factors[..., 1] - factors[..., 2]) * projection
        raw_factors = jnp.stack([along, factors[..., 2]], axis=-1)
        second_moment_correction = root_correction = None
        if b2 is not None:
            second_moment_correction = (b2 * state.second_moment_correction + (1 - b2)).astype(
                decays.dtype
            )
            root_correction = jnp.sqrt(second_moment_correction)
        scopes = allocation.scopes
        per_scope = (shares, raw_factors, factors, projection)
        trees = (
            state.prediction,
            state.parallel,
            state.orthogonal,
            state.second_moment,
            state.second_moment_maximum,
        )
        columns = [
            [None] * len(leaves) if tree is None else structure.flatten_up_to(tree)
            for tree in trees
        ]
        dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)] or [
            jnp.result_type(pair.prediction, momentum)
            for pair, momentum in zip(leaves, columns[0], strict=True)
        ]
        results = [
            _leaf_step(
                pair,
                *(scopes.at(scalars, number) for scalars in per_scope),
                *buffers,
                b2=None if b2 is None else (b2, 1 - b2),
                root_correction=root_correction,
                eps=eps,
                dtype=jnp.dtype(dtype),
            )
            for number, (pair, dtype, *buffers) in enumerate(
                zip(leaves, dtypes, *columns, strict=True)
            )
        ]
        new_trees = [structure.unflatten(column) for column in zip(*results, strict=True)] or [
            structure.unflatten([])
        ] * 6
        return new_trees[0], GDMAMState(
            count=optax.safe_increment(state.count),
            allocation=allocation,
            momentum_correction=momentum_correction,
            prediction=new_trees[1],
            parallel=new_trees[2],
            orthogonal=new_trees[3],
            second_moment=None if b2 is None else new_trees[4],
            second_moment_maximum=new_trees[5] if amsgrad else None,
            second_moment_correction=second_moment_correction,
        )

    return optax.GradientTransformationExtraArgs(init, update)


# One compiled function for a leaf's step: leaves of one shape are traced once.
@partial(jax.jit, static_argnames="dtype")
def _leaf_step(
    pair: GradientPair,
    share: jax.Array,
    raw_factor: jax.Array,
    factor: jax.Array,
    projection: jax.Array,
    prediction: jax.Array,
    parallel: jax.Array,
    orthogonal: jax.Array,
    second: jax.Array | None,
    largest: jax.Array | None,
    *,
    b2: tuple[Any, Any] | None,
    root_correction: Any,
    eps: Any,
    dtype: Any,
) -> tuple[jax.Array | None, ...]:
    """A leaf's update and its new buffers; ``b2`` is (b2, 1 - b2)."""
    components = (widen(pair.prediction), *split(pair, projection))
    buffers = (prediction, parallel, orthogonal)
    momenta = [
        (1 - share[k]) * widen(old) + share[k] * new
        for k, (old, new) in enumerate(zip(buffers, components, strict=True))
    ]
    direction: Any = sum(factor[k] * new for k, new in enumerate(momenta))
    if second is not None and b2 is not None:
        raw = raw_factor[0] * components[0] + raw_factor[1] * widen(pair.alignment)
        second = (b2[0] * second + b2[1] * raw**2).astype(second.dtype)
        largest = None if largest is None else jnp.maximum(largest, second)
        # u / (sqrt(v) / c + eps), with one division an element.
        denominator = floored_sqrt(second if largest is None else largest) + eps * root_correction
        direction = root_correction * direction / denominator
    stored = [narrow(new, old.dtype) for new, old in zip(momenta, buffers, strict=True)]
    return narrow(direction, dtype), *stored, second, largest
