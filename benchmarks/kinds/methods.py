"""Ways to train on two losses, each with a number that may be chosen for it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gdmam_jax as gdmam

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Of the alignment loss in the sum."""
PREFERENCES = (0.01, 0.1, 1.0, 10.0)
"""Of GDMAM for the alignment loss."""


class Method(NamedTuple):
    """A program that trains, and the number in which methods with one program differ.

    Attributes:
      program: ``"weighed"``, Adam behind a weighting; ``"gdmam"``; or ``"fork"``.
      setting: the weighting's place in `WEIGHTINGS`, or the preference.
    """

    program: str
    setting: float = 1.0


def norm_ratio(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    """The alignment gradient as long as the prediction's, by running means of their norms."""
    ratio = norms[..., :1] / jnp.maximum(norms[..., 1:], 1e-12)
    return jnp.concatenate([jnp.ones_like(ratio), ratio], axis=-1)


WEIGHTINGS = {
    **{f"sum x {factor:g}": gdmam.constant_weighting(1.0, factor) for factor in FACTORS},
    "pcgrad": gdmam.pcgrad_weighting,
    "norm ratio": norm_ratio,
}
UNCERTAINTY = "uncertainty"
"""Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018."""


def one_of_all(number: jax.Array) -> gdmam.RememberingWeighting:
    """The weighting in one place of `WEIGHTINGS`, or behind them uncertainty weighting.

    All are cheap beside a gradient, and one compiled program serves them all. The memory are
    uncertainty weighting's log-variances $s$ of $e^{-s} l + s$.
    """

    def update(gramian: Any, norms: Any, memory: Any, losses: Any) -> tuple[Any, Any]:
        uncertain = jnp.exp(-memory)
        found = [weighting(gramian, norms) for weighting in WEIGHTINGS.values()]
        slope = 1 - uncertain * losses.values
        return jnp.stack([*found, uncertain])[number], memory - 0.01 * jnp.clip(slope, -1, 1)

    return gdmam.RememberingWeighting(init=lambda zeros: zeros, update=update)


METHODS = {
    **{
        name: Method("weighed", number) for number, name in enumerate([*WEIGHTINGS, UNCERTAINTY])
    },
    **{f"gdmam {preference:g}": Method("gdmam", preference) for preference in PREFERENCES},
}
PROGRAMS = list(dict.fromkeys(method.program for method in METHODS.values()))
TUNED = {
    "sum tuned": [f"sum x {factor:g}" for factor in FACTORS],
    "gdmam tuned": [f"gdmam {preference:g}" for preference in PREFERENCES],
}
"""The best of several methods by the runs that rates are chosen by."""


def optimizer(program: str, rate: Any, setting: jax.Array) -> Any:
    """What takes pairs."""
    if program == "gdmam":
        return gdmam.gdmam(rate, weighting=gdmam.unit_weighting(preference=setting))
    return gdmam.weighed(optax.adam(rate), one_of_all(setting.astype(jnp.int32)))
