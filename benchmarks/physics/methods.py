"""Ways to train on the residual and the data loss, as optimizers of pairs."""

from collections.abc import Callable
from typing import Any

import optax

import gdmam_jax as gdmam

Rate = Callable[[Any], Any]
Method = Callable[[Rate], optax.GradientTransformation]


def weighed(weighting: gdmam.Weighting) -> Method:
    return lambda rate: gdmam.weighed(optax.adam(rate), weighting)


def ours(**choices: Any) -> Method:
    return lambda rate: gdmam.gdmam(rate, weight_decay=0.0, **choices)


METHODS: dict[str, Method] = {
    "summed": lambda rate: gdmam.summed(optax.adam(rate)),
    "data x 10": lambda rate: gdmam.summed(optax.adam(rate), alignment_weight=10.0),
    "data x 100": lambda rate: gdmam.summed(optax.adam(rate), alignment_weight=100.0),
    "pcgrad": weighed(gdmam.pcgrad_weighting),
    # For two gradients, equal projections on both are equal norms with weights that add up to 1.
    "imtl-g": weighed(gdmam.balanced_weighting),
    "config": weighed(gdmam.config_weighting),
    "gdmam": ours(),
    "gdmam open": ours(gate=gdmam.open_gate),
    "gdmam conflict": ours(gate=gdmam.conflict_gate),
    "gdmam balanced": ours(weighting=gdmam.balanced_weighting),
    "gdmam relative": ours(momentum=gdmam.relative_momentum, momenta="separate"),
    "gdmam described": ours(
        weighting=gdmam.norm_weighting,
        gate=gdmam.cosine_gate,
        momentum=gdmam.ratcheted_momentum,
        momenta="separate",
    ),
}
"""Those that are optimizers of pairs, by name."""

DATA_FIRST = "gdmam data first"
"""The default with the losses' roles exchanged: the data loss is the prediction."""

MOMENTUM_CONFIG = "m-config"
"""M-ConFIG, which evaluates one loss a step: see `training`."""

ALL_METHODS = [*METHODS, DATA_FIRST, MOMENTUM_CONFIG]
CHOICES = [name for name in ALL_METHODS if name.startswith("gdmam ")]
"""The default with one choice changed."""
