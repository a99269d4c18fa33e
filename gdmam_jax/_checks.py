"""Checks of arguments, made once, before a step is compiled."""

import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax


def _is_traced(value: Any) -> bool:
    """Whether ``value`` stands for a number that a compiled step will be given."""
    return isinstance(value, jax.core.Tracer)


def concrete(value: Any) -> Any:
    """An array of JAX as NumPy's, whose comparisons are not traced; anything else as it is."""
    return (
        jax.device_get(value) if isinstance(value, jax.Array) and not _is_traced(value) else value
    )


def check_range(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = float("inf"),
    *,
    above_minimum: bool = False,
    below_maximum: bool = False,
    whole: bool = False,
) -> None:
    """Raise an error that names ``name`` unless ``value`` is a finite number between the bounds.

    Scheduled and injected values are traced, have no value yet, and pass. A float narrower than
    float32 is refused even so: 0.999 is 1 in bfloat16, to which `optax.inject_hyperparams` casts
    all numbers if the parameters are bfloat16.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be float32 or better, got {dtype}; give optax.inject_hyperparams "
            "hyperparam_dtype=jnp.float32"
        )
    if _is_traced(value):
        return
    real = isinstance(value, numbers.Real) or (
        dtype is not None and value.ndim == 0 and not jnp.issubdtype(dtype, jnp.complexfloating)
    )
    if not real:
        raise TypeError(f"{name} must be a number, got {value!r}")
    value = concrete(value)
    low = value > minimum if above_minimum else value >= minimum
    below_maximum = below_maximum or maximum == float("inf")
    high = value < maximum if below_maximum else value <= maximum
    if not (low and high):
        left, right = "(" if above_minimum else "[", ")" if below_maximum else "]"
        raise ValueError(f"{name} must lie in {left}{minimum}, {maximum}{right}, got {value}")
    if whole and value != int(value):
        raise ValueError(f"{name} must be a whole number, got {value}")


def check_each(name: str, value: Any, *bounds: float, **strict: bool) -> None:
    """`check_range` of a number, or of each in a mapping, a tuple, a list or an array."""
    value = [*value.values()] if isinstance(value, Mapping) else value
    several = isinstance(value, tuple | list) or getattr(value, "ndim", 0) == 1
    for each in concrete(value) if several else [value]:
        check_range(name, each, *bounds, **strict)


def check_key(key: Any) -> None:
    """Raise a ``TypeError`` unless ``key`` is a random key, a seed or None."""
    shape = getattr(key, "shape", None)
    typed = shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = shape == (2,) and key.dtype == jnp.uint32
    if not (key is None or isinstance(key, numbers.Integral) or typed or raw):
        raise TypeError(f"key must be a random key or a seed, got {key!r}")


def check_scheduled(name: str, value: Any, *bounds: float, **strict: bool) -> None:
    """`check_range` of a number that may be a schedule."""
    if not callable(value):
        check_range(name, value, *bounds, **strict)


def check_learning_rate(value: Any) -> None:
    """Raise an error unless ``value`` is a finite number or a schedule; None would mean ascent."""
    check_scheduled("learning_rate", value, -float("inf"), above_minimum=True)


def is_numeric(value: Any) -> bool:
    """Whether ``value`` is an array or a plain real number."""
    return isinstance(value, int | float) or hasattr(value, "shape")


def check_state(state: Any, kind: type) -> None:
    """Raise a ``TypeError`` unless ``state`` is an optimizer state of this kind."""
    if not isinstance(state, kind):
        raise TypeError(
            f"expected the optimizer state, a {kind.__name__}, got {type(state).__name__}; make "
            "one with this optimizer's init"
        )


def check_choice(name: str, same: bool) -> None:
    """Raise a ``ValueError`` unless an optimizer state was made with this optimizer's choice."""
    if not same:
        raise ValueError(
            f"the optimizer state was made with another choice of {name}; make a new state with "
            "this optimizer's init, or give the optimizer the old choice"
        )


def with_extra_args(optimizer: Any) -> Any:
    """The Optax transformation with extra arguments; a ``TypeError`` if it is not one."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"expected an Optax optimizer, got {optimizer!r}")
    # optax.MultiSteps is not a GradientTransformation, but takes extra arguments.
    plain = isinstance(optimizer, optax.GradientTransformation)
    return optax.with_extra_args_support(optimizer) if plain else optimizer


def check_function(name: str, value: Any, advice: str = "") -> None:
    """Raise a ``TypeError`` that names ``name`` unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}{advice}")


def check_chosen(name: str, value: Any) -> None:
    """`check_function` of an optimizer's choice, with what to write instead."""
    if hasattr(value, "update"):
        advice = (
            "; an optimizer goes behind: write weighed(optimizer, weighting), or "
            "optax.chain(allocate(weighting), optimizer)"
        )
    elif isinstance(value, int | float | str | None):
        momentum = name == "momentum" and isinstance(value, float)
        advice = f"; write constant_momentum(initial={value})" if momentum else ""
    else:
        advice = (
            "; optax.inject_hyperparams treats functions as schedules: give it "
            "static_args=('weighting', 'gate', 'momentum', 'scope')"
        )
    check_function(name, value, advice)


def check_losses(losses: Any) -> None:
    """Raise a ``ValueError`` unless ``losses`` can be an ``alignment_losses`` argument."""
    number = losses is None or (isinstance(losses, int) and losses >= 1)
    names = isinstance(losses, tuple | list) and 0 < len(losses) == len({*losses})
    names = names and all(isinstance(name, str) for name in losses)
    if not (number or names):
        raise ValueError(
            "alignment_losses must be a number of losses, at least 1, or a sequence of their "
            f"names, each once; got {losses!r}. optax.inject_hyperparams would inject a number: "
            "give it static_args=('alignment_losses',)"
        )
    if names and "prediction" in losses:
        raise ValueError(
            f"alignment_losses names one 'prediction', which is the first loss; got {losses!r}"
        )


def check_ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raise a ``ValueError`` that names both unless ``low <= high``."""
    if not (_is_traced(low) or _is_traced(high)) and concrete(low) > concrete(high):
        raise ValueError(f"{low_name} must not exceed {high_name}, got {low} > {high}")
