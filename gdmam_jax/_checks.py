"""Checks of arguments, made once, before a step is compiled."""

from typing import Any

import jax
import jax.numpy as jnp


def is_concrete(value: Any) -> bool:
    """Whether ``value`` is a number now, and not one that a compiled step will be given."""
    return value is not None and not isinstance(value, jax.core.Tracer)


def check_range(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = float("inf"),
    *,
    above_minimum: bool = False,
    below_maximum: bool = False,
) -> None:
    """Raise a ``ValueError`` that names ``name`` unless ``value`` lies between the bounds.

    Scheduled and injected values are traced, have no value yet, and pass. A float narrower than
    float32 is refused even so: 0.999 is 1 in bfloat16, to which `optax.inject_hyperparams` casts
    all numbers where the parameters are bfloat16.
    """
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"{name} must be float32 or better, got {dtype}; give optax.inject_hyperparams "
            "hyperparam_dtype=jnp.float32"
        )
    if not is_concrete(value):
        return
    low = value > minimum if above_minimum else value >= minimum
    high = value < maximum if below_maximum else value <= maximum
    if not (low and high):
        left, right = "(" if above_minimum else "[", ")" if below_maximum else "]"
        raise ValueError(f"{name} must lie in {left}{minimum}, {maximum}{right}, got {value}")


def check_ordered(low_name: str, low: Any, high_name: str, high: Any) -> None:
    """Raise a ``ValueError`` that names both unless ``low <= high``."""
    if is_concrete(low) and is_concrete(high) and low > high:
        raise ValueError(f"{low_name} must not exceed {high_name}, got {low} > {high}")
