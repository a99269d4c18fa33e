"""Ways to train on two losses, each with a number that may be chosen for it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gdmam_jax as gdmam
from benchmarks.kinds.kind import Kind

FACTORS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Factors of the alignment loss in the sum."""
PREFERENCES = (0.01, 0.1, 1.0, 10.0)
"""GDMAM's preferences for the alignment loss, and factors of the norm ratio at the last layer."""


class Method(NamedTuple):
    """A program that trains, and the number in which methods with one program differ.

    Attributes:
      program: ``"weighed"``, Adam behind a weighting; ``"gdmam"``; ``"fork"``; or ``"last-layer"``,
        Adam on the sum with the factor that makes the norms at the last layer alike (VQGAN).
      setting: the weighting's place in `WEIGHTINGS`, or the preference.
    """

    program: str
    setting: float = 1.0


WEIGHTINGS = {
    **{f"sum x {factor:g}": gdmam.constant_weighting(1.0, factor) for factor in FACTORS},
    "pcgrad": gdmam.pcgrad_weighting,
    "gradient norm": gdmam.gradient_norm_weighting(every=1),
    "uncertainty": gdmam.uncertainty_weighting(),
}
"""In front of Adam. With two losses UPGrad's weights are half of PCGrad's, the same to Adam."""


def one_of_all(number: jax.Array) -> gdmam.RememberingWeighting:
    """The weighting in one place of `WEIGHTINGS`.

    All are cheap compared with a gradient, and one compiled program serves them all.
    """
    within = {
        name: weighting
        for name, weighting in WEIGHTINGS.items()
        if isinstance(weighting, gdmam.RememberingWeighting)
    }

    def init(zeros: jax.Array) -> dict[str, Any]:
        return {name: weighting.init(zeros) for name, weighting in within.items()}

    def update(gramian: Any, norms: Any, memory: Any, losses: Any) -> tuple[Any, Any]:
        after, found = {}, []
        for name, weighting in WEIGHTINGS.items():
            if name in within:
                weights, after[name] = weighting.update(gramian, norms, memory[name], losses)
            else:
                weights = weighting(gramian, norms)
            found.append(weights)
        return jnp.stack(found)[number], after

    return gdmam.RememberingWeighting(init, update)


METHODS = {
    **{name: Method("weighed", number) for number, name in enumerate(WEIGHTINGS)},
    **{f"gdmam {preference:g}": Method("gdmam", preference) for preference in PREFERENCES},
    **{
        f"last layer {preference:g}": Method("last-layer", preference) for preference in PREFERENCES
    },
    "fork": Method("fork"),
}
PROGRAMS = list(dict.fromkeys(method.program for method in METHODS.values()))
TUNED = {
    "sum tuned": [f"sum x {factor:g}" for factor in FACTORS],
    "gdmam tuned": [f"gdmam {preference:g}" for preference in PREFERENCES],
    "last layer tuned": [f"last layer {preference:g}" for preference in PREFERENCES],
}
"""The best of several methods, by the runs that choose the rates."""


def programs(kind: Kind) -> list[str]:
    """The programs for which a kind has what they need."""
    lacking = {"fork": not kind.trunk, "last-layer": kind.last is None}
    return [program for program in PROGRAMS if not lacking.get(program)]


def optimizer(program: str, rate: Any, setting: jax.Array, last: Any = None) -> Any:
    """The optimizer of pairs; ``last`` are the pairs of the last layer."""
    if program == "gdmam":
        return gdmam.gdmam(rate, weighting=gdmam.unit_weighting(preference=setting))
    weighting: Any = gdmam.constant_weighting(1.0, setting)
    if program == "weighed":
        weighting = one_of_all(setting.astype(jnp.int32))
    elif last is not None:
        norms = gdmam.decompose(last).geometry
        ratio = norms.prediction_norm / (norms.alignment_norm + 1e-4)
        weighting = gdmam.constant_weighting(1.0, setting * jnp.minimum(ratio, 1e4))
    return gdmam.weighed(optax.adam(rate), weighting)
