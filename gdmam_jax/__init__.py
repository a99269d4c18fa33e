"""GDMAM for JAX: train on a prediction loss and an alignment loss that may conflict."""

from gdmam_jax.allocation import (
    anchored_momentum,
    balanced_weighting,
    conflict_gate,
    constant_weighting,
    cosine_gate,
    norm_weighting,
    open_gate,
    ratcheted_momentum,
    relative_momentum,
)
from gdmam_jax.diagnostics import diagnostics
from gdmam_jax.geometry import decompose, leaf_scope
from gdmam_jax.optimizers import gdmam, summed
from gdmam_jax.pairs import (
    GradientPair,
    pair_gradients,
    unpair_gradients,
    value_and_paired_grad,
)
from gdmam_jax.released import clip_by_recent_norm, gdmam_released
from gdmam_jax.transform import GDMAMState, scale_by_gdmam
from gdmam_jax.wrappers import over_pairs

__all__ = [
    "GDMAMState",
    "GradientPair",
    "anchored_momentum",
    "balanced_weighting",
    "clip_by_recent_norm",
    "conflict_gate",
    "constant_weighting",
    "cosine_gate",
    "decompose",
    "diagnostics",
    "gdmam",
    "gdmam_released",
    "leaf_scope",
    "norm_weighting",
    "open_gate",
    "over_pairs",
    "pair_gradients",
    "ratcheted_momentum",
    "relative_momentum",
    "scale_by_gdmam",
    "summed",
    "unpair_gradients",
    "value_and_paired_grad",
]
