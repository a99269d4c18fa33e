"""Ready-made optimizers of pairs."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import Allocation, add_up, allocate
from gdmam_jax._checks import check_learning_rate, check_range, check_scheduled, with_extra_args
from gdmam_jax._gates import Gate, open_gate, priority_gate
from gdmam_jax._losses import by_loss
from gdmam_jax._momenta import MomentumRule, constant_momentum
from gdmam_jax._numerics import where
from gdmam_jax._pairs import begin_update, check_floating, halves
from gdmam_jax._remembering import RememberingWeighting
from gdmam_jax._scopes import Scope
from gdmam_jax._settings import default
from gdmam_jax._transform import scale_by_gdmam
from gdmam_jax._weightings import Weighting, unit_weighting


def gdmam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weighting: Weighting | RememberingWeighting = default(unit_weighting),
    gate: Gate = default(priority_gate),
    momentum: MomentumRule = default(constant_momentum),
    momenta: Literal["steered", "separate"] = "steered",
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    statistics_decay: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    amsgrad: bool = False,
    weight_decay: Any = 1e-4,
    mask: Any = None,
    mu_dtype: Any = None,
    not_finite: Literal["apply", "skip", "skip_loss"] = "apply",
    max_skips: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GDMAM ready to use: `scale_by_gdmam` with a second moment, weight decay and learning rate.

    With its default choices it is Adam, with ``b1=0.95``, on the allocated gradient:
    ``optax.chain(allocate(), optax.scale_by_adam(b1=0.95), optax.add_decayed_weights(1e-4),
    optax.scale_by_learning_rate(learning_rate))``.

    Every number is a scalar that `optax.inject_hyperparams` can inject or schedule.

    Args:
      learning_rate: a number, or a schedule of the step.
      weighting: the tasks' weights: a function ``(gramian, norms) -> weights``, such as
        `unit_weighting`, which lets both losses count the same, or a `RememberingWeighting`.
      gate: how much of the alignment gradient's parts along and across the prediction gradient
        passes: a function ``(cosine, ratio) -> (parallel, orthogonal)``.
      momentum: the momentum coefficients: a function ``statistics -> momentum``.
      momenta: ``"steered"``, one buffer for the allocated gradient, or ``"separate"``, one for each
        of its components.
      scope: what is decomposed together: a function from a leaf's path, such as
        ``"encoder/kernel"``, to a label, for example `leaf_scope`. None: all leaves together.
      alignment_losses: how many alignment losses there are; or the names of those that the loss
        function returns in a dictionary, in the order in which weights are given. None: one.
      statistics_decay: decay of the running statistics of gradients' and components' norms, in
        [0, 1).
      b2: decay of the second moment, in [0, 1); None for no second moment.
      eps: added to the root of the second moment, above 0.
      amsgrad: divide by the largest second moment so far instead of the current one, as PyTorch
        does; Optax's is the largest after its bias is corrected.
      weight_decay: factor of the decoupled weight decay, at least 0.
      mask: which parameters decay: a tree of booleans with the parameters' structure or a prefix
        of it, or a function of the parameters that returns one. None: all.
      mu_dtype: dtype of the momenta; None: that of the parameters.
      not_finite: what happens to gradients that are not finite: ``"apply"``, ``"skip"`` or
        ``"skip_loss"``, see `allocate`. A step that is left out also leaves out weight decay and
        the schedule's step, so that parameters stay the same bit for bit. A schedule that
        `optax.inject_hyperparams` injects still advances.
      max_skips: after this many steps left out in a row those that follow are taken, finite or
        not, until one is finite. None: never.
      axis_name: inside `jax.shard_map`, the mesh axes over which parameters are sharded.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair` and the parameters.

    Raises:
      ValueError: as `scale_by_gdmam`; or the learning rate or weight decay is out of range.
      TypeError: as `scale_by_gdmam`; or the learning rate is neither a number nor a function, or
        the mask is a single boolean.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> def losses(w):
      ...     return jnp.sum((w - 1) ** 2), 100 * (w[0] - w[1]) ** 2
      >>> optimizer = gdmam.gdmam(0.1)
      >>> @jax.jit
      ... def step(w, state):
      ...     _, pairs = gdmam.value_and_paired_grad(losses)(w)
      ...     updates, state = optimizer.update(pairs, state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.array([3.0, -2.0])
      >>> state = optimizer.init(w)
      >>> for _ in range(200):
      ...     w, state = step(w, state)
      >>> bool(jnp.all(jnp.abs(w - 1) < 0.1))
      True
    """
    check_scheduled("weight_decay", weight_decay)
    check_learning_rate(learning_rate)
    if isinstance(mask, bool | jax.Array):
        raise TypeError(
            f"mask must be a tree of booleans or a function, got {mask!r}; "
            + (
                "without a mask every parameter decays, with weight_decay=0 none"
                if isinstance(mask, bool)
                else "optax.inject_hyperparams treats functions as schedules: give it "
                "static_args=('mask',)"
            )
        )
    chain = optax.chain(
        scale_by_gdmam(
            weighting=weighting,
            gate=gate,
            momentum=momentum,
            momenta=momenta,
            scope=scope,
            alignment_losses=alignment_losses,
            statistics_decay=statistics_decay,
            b2=b2,
            eps=eps,
            amsgrad=amsgrad,
            mu_dtype=mu_dtype,
            not_finite=not_finite,
            max_skips=max_skips,
            axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if not_finite == "apply":
        return chain

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        changes, (new, *links) = chain.update(updates, state, params, **extra_args)
        apply = new.allocation.skipped == state[0].allocation.skipped
        # p + (-0.0) is p to the last bit, even where p is -0.0.
        changes = jax.tree.map(lambda change: jnp.where(apply, change, -0.0), changes)
        return changes, (new, *where(apply, links, [*state[1:]]))

    return optax.GradientTransformationExtraArgs(chain.init, update)


def summed(
    optimizer: optax.GradientTransformation,
    prediction_weight: Any = 1.0,
    alignment_weight: Any = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Lets an ordinary optimizer take pairs: it gets the weighted sum of the gradients.

    Use it inside `optax.partition` for the parameters that GDMAM should leave alone. It measures
    nothing and has no diagnostics. For a baseline in the same training loop, use
    ``weighed(optimizer, sum_weighting)``, which makes the same updates and has diagnostics.

    Args:
      optimizer: the transformation that takes the sum.
      prediction_weight: factor of the prediction gradient, at least 0.
      alignment_weight: factor of each alignment gradient, at least 0.

    Returns:
      A transformation as `weighed` returns it.

    Raises:
      ValueError: a weight is negative; while tracing, the halves of a pair differ.
      TypeError: ``optimizer`` is no Optax optimizer; while tracing, an update that is not a
        `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.summed(optax.sgd(1.0), alignment_weight=0.5)
      >>> pair = gdmam.GradientPair(jnp.array(1.0), jnp.array(4.0))
      >>> updates, _ = optimizer.update(pair, optimizer.init(jnp.array(0.0)))
      >>> float(updates)
      -3.0
    """
    check_range("prediction_weight", prediction_weight)
    check_range("alignment_weight", alignment_weight)

    def weights(state: Any, count: int) -> list[Any]:
        del state
        return [prediction_weight] + [alignment_weight] * (count - 1)

    def init(params: optax.Params) -> optax.EmptyState:
        check_floating(params, "parameter")
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        leaves, structure = begin_update(updates, alignment, params)
        count = len(halves(leaves[0])) if leaves else 0
        taken = None if present is None or not leaves else by_loss("present", present, count - 1)
        sums = [add_up(pair, weights(state, count), taken) for pair in leaves]
        return structure.unflatten(sums), state

    return _behind(optax.GradientTransformationExtraArgs(init, update), optimizer, weights)


def weighed(
    optimizer: optax.GradientTransformation,
    weighting: Weighting | RememberingWeighting,
    gate: Gate = default(open_gate),
    *,
    scope: Scope | None = None,
    alignment_losses: int | Sequence[str] | None = None,
    statistics_decay: Any = 0.9,
    not_finite: Literal["apply", "skip", "skip_loss"] = "apply",
    max_skips: Any = None,
    axis_name: str | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets an ordinary optimizer take pairs: it gets the gradients' sum, weighed by a weighting.

    The optimizer gets $\sum_k w_k g_k$. With `pcgrad_weighting` this is PCGrad. `weighed` is
    ``optax.chain(allocate(weighting, gate), optimizer)``, but also works with optimizers that need
    the loss's value. For these, pass the losses as ``value=``, the pairs as ``grad=`` and the loss
    function as ``value_fn=``. A line search then gets the function whose gradient the optimizer
    gets: $\sum_k w_k l_k$, with the step's weights held fixed.

    Args:
      optimizer: the transformation that takes the weighted sum.
      weighting: the tasks' weights; see `allocate`, as for all arguments below.
      gate: see `allocate`; but the default, `open_gate`, leaves the weighted sum as it is.
      scope: see `allocate`.
      alignment_losses: see `allocate`.
      statistics_decay: see `allocate`.
      not_finite: see `allocate`. At a step that is left out the optimizer gets a gradient of 0.
      max_skips: see `allocate`.
      axis_name: see `allocate`.

    Returns:
      A transformation whose ``update`` takes a tree of `GradientPair`, or the prediction gradients
      with ``alignment=`` the alignment gradients, and ``present=`` as `allocate` does. A pair of
      losses in ``value=`` reaches the optimizer as the weighed sum of those that count. With
      several scopes, whose weights differ, it does not. Anything else reaches it unchanged.
      `diagnostics` finds the weights, the gradients' norms and their angle in its state.

    Raises:
      ValueError: a number is out of range, or ``not_finite`` or ``alignment_losses`` is not valid;
        while tracing, the halves of a pair differ, the weighting does not return a weight for each
        task, ``value_fn`` returns something other than the losses, or it is given with several
        scopes, which have no function in common.
      TypeError: ``optimizer`` is no Optax optimizer, or a choice is not a function; while tracing,
        an update that is not a `GradientPair`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.weighed(optax.sgd(1.0), gdmam.pcgrad_weighting)
      >>> pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0]))
      >>> updates, _ = optimizer.update(pair, optimizer.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, -1.5]
    """
    link = allocate(
        weighting,
        gate,
        scope=scope,
        alignment_losses=alignment_losses,
        statistics_decay=statistics_decay,
        not_finite=not_finite,
        max_skips=max_skips,
        axis_name=axis_name,
    )

    def weights(state: Allocation, count: int) -> jax.Array | None:
        del count
        return None if state.scopes.labels else state.factors

    return _behind(link, optimizer, weights, alignment_losses or 1)


def _behind(
    link: optax.GradientTransformationExtraArgs,
    optimizer: optax.GradientTransformation,
    weights: Callable[[Any, int], Any],
    losses: int | Sequence[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A chain of a link that takes pairs and an optimizer, which sees the weighed loss's value.

    Args:
      link: pairs in, the weighed gradient out.
      optimizer: what takes the weighed gradient.
      weights: the losses' weights, a function of the link's state and of the number of losses;
        None where the weighed gradient is the gradient of no function.
      losses: how many alignment losses there are, or their names; None: any number.
    """
    inner = with_extra_args(optimizer)

    def init(params: optax.Params) -> tuple[Any, Any]:
        return link.init(params), inner.init(params)

    def update(
        updates: optax.Updates,
        state: tuple[Any, Any],
        params: optax.Params | None = None,
        *,
        alignment: Any = None,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[Any, Any]]:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(
                f"expected the optimizer's state, of two links, got {type(state).__name__}; make "
                "one with this optimizer's init"
            )
        given = extra_args.get("value")
        gradient, first = link.update(
            updates, state[0], params, alignment=alignment, present=present, value=given
        )

        apart = weights(first, 1) is None

        def weighed_value(what: str, values: Any) -> jax.Array:
            count = losses if losses is not None else len(jax.tree.leaves(values)) - 1
            each = by_loss(what, values, count)
            counts = [True] * len(each) if present is None else by_loss("present", present, count)
            # A loss that is left out may be NaN.
            shares = [
                jnp.where(here & (factor != 0), factor * value, 0)
                for factor, value, here in zip(weights(first, len(each)), each, counts, strict=True)
            ]
            return sum(shares[1:], shares[0])

        if isinstance(given, Sequence):
            del extra_args["value"]
            if not apart:
                extra_args["value"] = weighed_value("value", given)
        if "grad" in extra_args:
            extra_args["grad"] = gradient
        if "value_fn" in extra_args:
            if apart:
                raise ValueError(
                    "value_fn= needs one scope: with several, each scope has weights of its own, "
                    "and the allocated gradient is the gradient of no function; leave scope out"
                )
            losses_of = extra_args["value_fn"]

            @functools.wraps(losses_of)
            def value_fn(*args: Any, **kwargs: Any) -> jax.Array:
                return weighed_value("what value_fn returns", losses_of(*args, **kwargs))

            extra_args["value_fn"] = value_fn
            if given is not None and not isinstance(given, Sequence):
                by_loss("value", given, 1 if losses is None else losses)
        result, second = inner.update(gradient, state[1], params, **extra_args)
        return result, (first, second)

    return optax.GradientTransformationExtraArgs(init, update)
