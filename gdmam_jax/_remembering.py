"""Weightings with a memory or with the losses' values, and weightings made from any other.

Each is a function of its settings that returns a `RememberingWeighting`. Given to an optimizer
without being called, it has its default settings.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from gdmam_jax import _geometry
from gdmam_jax._checks import check_chosen, check_each, check_range
from gdmam_jax._losses import Losses, as_array
from gdmam_jax._numerics import divide, where
from gdmam_jax._settings import Choice, in_order
from gdmam_jax._weightings import Weighting

F = TypeVar("F", bound=Callable[..., Any])
_MADE_BY_CALL: set[Any] = set()


class RememberingWeighting(NamedTuple):
    """A weighting with a state, made of two functions, as Optax's transformations are.

    Attributes:
      init: ``zeros -> memory``: the memory before the first step, a tree of arrays. It is given
        zeros of the weights' shape, ``(..., K)`` with ``...`` the scopes, and of their dtype. It
        must be finite: ``not_finite="skip"`` leaves out every step after which it is not.
      update: ``(gramian, norms, memory, losses) -> (weights, memory)``: it is given what a plain
        weighting gets, the memory, and the losses' names, values and presence, see `Losses`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> def update(gramian, norms, memory, losses):
      ...     memory = 0.9 * memory + 0.1 * gdmam.pcgrad_weighting(gramian, norms)
      ...     return memory, memory
      >>> slow = gdmam.RememberingWeighting(init=lambda zeros: zeros + 1, update=update)
      >>> link = gdmam.allocate(slow, gdmam.open_gate)
      >>> pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0]))
      >>> _, state = link.update(pair, link.init(jnp.zeros(2)))
      >>> [round(weight, 3) for weight in state.memory.tolist()]
      [1.1, 1.05]
    """

    init: Callable[[jax.Array], Any]
    update: Callable[[Any, Any, Any, Losses], tuple[Any, Any]]


def made_by_call(function: F) -> F:
    """Marks a function of settings that returns a weighting: uncalled, it is one, too."""
    _MADE_BY_CALL.add(function)
    return function


def made(weighting: Any) -> Any:
    """The weighting, also of a function of settings that was given uncalled."""
    known = inspect.isfunction(weighting) and weighting in _MADE_BY_CALL
    return weighting() if known else weighting


def check_weighting(weighting: Any) -> None:
    """Raise a ``TypeError`` unless ``weighting`` is a function or a `RememberingWeighting`."""
    if not isinstance(weighting, RememberingWeighting):
        check_chosen("weighting", weighting)


def first_memory(weighting: Any, zeros: jax.Array) -> Any:
    """The memory before the first step; None for a weighting without one."""
    weighting = made(weighting)
    if not isinstance(weighting, RememberingWeighting):
        return None
    # An array in two places could not be donated.
    return jax.tree.map(jnp.copy, weighting.init(zeros))


def weigh(
    weighting: Weighting | RememberingWeighting,
    gramian: Any,
    norms: Any,
    memory: Any,
    losses: Losses,
) -> tuple[Any, Any]:
    """The weights of a weighting, and its memory, if it has one."""
    weighting = made(weighting)
    if isinstance(weighting, RememberingWeighting):
        weights, after = weighting.update(gramian, norms, memory, losses)
        return weights, jax.tree.map(_as_before, after, memory)
    if isinstance(weighting, Choice):
        weighting = weighting.for_losses(losses.names)
    known: dict[str, Any] = {}
    if losses.present is not None and "present" in inspect.signature(weighting).parameters:
        known["present"] = losses.present
    return weighting(gramian, norms, **known), memory


def _as_before(new: Any, old: Any) -> Any:
    """A number of the memory in its dtype, which a setting in float64 would have changed."""
    return jnp.asarray(new, old.dtype) if jnp.issubdtype(old.dtype, jnp.floating) else new


def values_of(name: str, losses: Losses) -> jax.Array:
    """The losses' values, 1 for those that are absent.

    Raises:
      ValueError: they are not known.
    """
    if losses.values is None:
        raise ValueError(
            f"{name} needs the losses' values: give them to update, value=(prediction, alignment), "
            "as value_and_paired_grad returns them; a fork has none"
        )
    return losses.values if losses.present is None else jnp.where(losses.present, losses.values, 1)


def check_lowest(value: Any) -> None:
    """Raise an error unless ``value`` can be the lowest value of each loss, see `each_loss`."""
    check_each("lowest", value, -float("inf"), above_minimum=True)
    if isinstance(value, Mapping) and "prediction" not in value:
        raise ValueError(f"lowest must name 'prediction', too, got {', '.join(value)}")


def presence(losses: Losses, like: jax.Array) -> jax.Array:
    """Which losses are present, booleans of shape ``(K,)``."""
    return jnp.ones(like.shape[-1], bool) if losses.present is None else losses.present


def each_loss(what: str, value: Any, losses: Losses, like: jax.Array) -> jax.Array:
    """A setting in the losses' order, shape ``(K,)``: from one number, one for each, or a mapping.

    A mapping by name must name the prediction, too.
    """
    given = jnp.asarray(in_order(what, value, ("prediction", *losses.names)), like.dtype)
    if given.shape not in ((), like.shape[-1:]):
        raise ValueError(
            f"{what} must be a number or {like.shape[-1]} of them, one for each loss, got shape "
            f"{given.shape}"
        )
    return jnp.broadcast_to(given, like.shape[-1:])


def kept(present: Any, new: Any, old: Any) -> Any:
    """The new numbers of losses that are present, along the last axis, else the old ones."""
    if present is None:
        return new
    return where(present, new, old)


def learned(
    optimizer: Any, slope: jax.Array, values: jax.Array, state: Any, present: Any
) -> tuple[jax.Array, Any]:
    """One step down the slope for the losses present: their values, and the optimizer's state."""
    change, after = optimizer.update(slope, state, values)
    if present is None:
        return values + change, after
    # Only the count belongs to no loss, and goes on.
    after = jax.tree.map(
        lambda new, old: kept(present, new, old) if new.shape == values.shape else new, after, state
    )
    return jnp.where(present, values + change, values), after


class _Running(NamedTuple):
    """The memory of the weighting within, the running weights, and which losses have any."""

    inner: Any
    weights: jax.Array
    seen: jax.Array


def running_weighting(
    weighting: Weighting | RememberingWeighting, *, decay: Any = 0.9
) -> RememberingWeighting:
    r"""The running mean of a weighting's weights, as CR-MOGM smooths them.

    $w(t) = \beta w(t - 1) + (1 - \beta) \hat w(t)$, with $\hat w(t)$ the weighting's own. A loss
    starts with the first weight it gets. The weights of a step depend on its batch, which biases
    methods such as MGDA and CAGrad; with a running mean there is a proof of convergence. What the
    weighting promises about a step's direction no longer holds.

    Args:
      weighting: a weighting, with a memory or without.
      decay: $\beta$, in [0, 1).

    Returns:
      A weighting with a memory.

    Raises:
      ValueError: ``decay`` is out of range.
      TypeError: the weighting is neither a function nor a `RememberingWeighting`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.running_weighting(gdmam.mgda_weighting, decay=0.5)
      >>> memory = weighting.init(jnp.zeros(2))
      >>> for squares in ([1.0, 1.0], [3.0, 1.0]):
      ...     gramian = jnp.diag(jnp.array(squares))
      ...     weights, memory = weighting.update(gramian, None, memory, gdmam.Losses())
      >>> weights.tolist()
      [0.375, 0.625]

    References:
      Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
      Beyond, NeurIPS 2022.
    """
    check_weighting(weighting)
    check_range("decay", decay, 0, 1, below_maximum=True)

    def init(zeros: jax.Array) -> _Running:
        seen = jnp.zeros(zeros.shape[-1], bool)
        return _Running(first_memory(weighting, zeros), zeros, seen)

    def update(gramian: Any, norms: Any, memory: _Running, losses: Losses) -> tuple[Any, Any]:
        new, inner = weigh(weighting, gramian, norms, memory.inner, losses)
        shape, dtype, here = memory.weights.shape, memory.weights.dtype, losses.present
        new = as_array("weighting", new, shape, dtype, "weights")
        mixed = jnp.where(memory.seen, decay * memory.weights + (1 - decay) * new, new)
        weights = kept(here, mixed, memory.weights)
        return weights, _Running(inner, weights, memory.seen | presence(losses, weights))

    return RememberingWeighting(init, update)


def normalised_weighting(weighting: Weighting | RememberingWeighting) -> RememberingWeighting:
    r"""Normalise, then weigh: a weighting of the unit gradients.

    $w_k = \hat w_k / n_k$, where $\hat w$ are the weighting's own for the Gramian
    $C_{jk} = G_{jk} / (n_j n_k)$. The result does not change when a loss is rescaled, and does
    not shrink as gradients do. What the weighting promises about directions still holds. A loss
    without a gradient has none for the weighting, either.

    Args:
      weighting: a weighting, with a memory or without; the norms' running means that it sees are in
        units of the step's norms.

    Returns:
      A weighting with the memory of the given one.

    Raises:
      TypeError: the weighting is neither a function nor a `RememberingWeighting`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.normalised_weighting(gdmam.pcgrad_weighting)
      >>> gramian = jnp.array([[1.0, -2.0], [-2.0, 16.0]])
      >>> weighting.update(gramian, None, None, gdmam.Losses())[0].tolist()
      [1.5, 0.375]
    """
    check_weighting(weighting)

    def update(gramian: Any, norms: Any, memory: Any, losses: Losses) -> tuple[Any, Any]:
        lengths = _geometry.norms(gramian)
        inverses = divide(jnp.ones_like(lengths), lengths)
        units = inverses[..., :, None] * gramian * inverses[..., None, :]
        means = None if norms is None else norms * inverses
        weights, memory = weigh(weighting, units, means, memory, losses)
        weights = as_array("weighting", weights, lengths.shape, lengths.dtype, "weights")
        return weights * inverses, memory

    return RememberingWeighting(lambda zeros: first_memory(weighting, zeros), update)
