"""Weightings with a memory, or with the losses' values."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from gdmam_jax._checks import check_function
from gdmam_jax._losses import Losses
from gdmam_jax._settings import Choice
from gdmam_jax._weightings import Weighting


class RememberingWeighting(NamedTuple):
    """A weighting with a state, made of two functions, as Optax's transformations are.

    Attributes:
      init: ``zeros -> memory``: of zeros of the weights' shape and dtype, ``(..., K)``, with
        ``...`` the scopes, the memory before the first step: a tree of arrays.
      update: ``(gramian, norms, memory, losses) -> (weights, memory)``: what a plain weighting
        gets, the memory, and the losses' names, values and presence, see `Losses`.

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


def check_weighting(weighting: Any, advice: str) -> None:
    """Raise a ``TypeError`` unless ``weighting`` is a function or a `RememberingWeighting`."""
    if not isinstance(weighting, RememberingWeighting):
        check_function("weighting", weighting, advice)


def first_memory(weighting: Any, zeros: jax.Array) -> Any:
    """The memory before the first step; None of a weighting that has none."""
    return weighting.init(zeros) if isinstance(weighting, RememberingWeighting) else None


def weigh(
    weighting: Weighting | RememberingWeighting,
    gramian: jax.Array,
    norms: jax.Array,
    memory: Any,
    losses: Losses,
) -> tuple[Any, Any]:
    """The weights of either kind of weighting, and its memory."""
    if isinstance(weighting, RememberingWeighting):
        return weighting.update(gramian, norms, memory, losses)
    if isinstance(weighting, Choice):
        weighting = weighting.for_losses(losses.names)
    known: dict[str, Any] = {}
    if losses.present is not None and "present" in inspect.signature(weighting).parameters:
        known["present"] = losses.present
    return weighting(gramian, norms, **known), memory
