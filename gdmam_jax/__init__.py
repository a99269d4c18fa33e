"""GDMAM for JAX: train on a prediction loss and alignment losses that may conflict."""

from importlib import metadata as _metadata

from gdmam_jax._allocation import Allocation as Allocation
from gdmam_jax._allocation import allocate as allocate
from gdmam_jax._carrying import carry_over as carry_over
from gdmam_jax._diagnostics import diagnostics as diagnostics
from gdmam_jax._fork import fork as fork
from gdmam_jax._fork import fork_state as fork_state
from gdmam_jax._gates import Gate as Gate
from gdmam_jax._gates import conflict_gate as conflict_gate
from gdmam_jax._gates import cosine_gate as cosine_gate
from gdmam_jax._gates import open_gate as open_gate
from gdmam_jax._gates import priority_gate as priority_gate
from gdmam_jax._geometry import Decomposition as Decomposition
from gdmam_jax._geometry import Geometry as Geometry
from gdmam_jax._geometry import decompose as decompose
from gdmam_jax._gradients import Weighing as Weighing
from gdmam_jax._gradients import value_and_paired_grad as value_and_paired_grad
from gdmam_jax._gradients import value_and_weighed_grad as value_and_weighed_grad
from gdmam_jax._losses import Losses as Losses
from gdmam_jax._momenta import MomentumRule as MomentumRule
from gdmam_jax._momenta import NormStatistics as NormStatistics
from gdmam_jax._momenta import anchored_momentum as anchored_momentum
from gdmam_jax._momenta import constant_momentum as constant_momentum
from gdmam_jax._momenta import ratcheted_momentum as ratcheted_momentum
from gdmam_jax._momenta import relative_momentum as relative_momentum
from gdmam_jax._optimizers import gdmam as gdmam
from gdmam_jax._optimizers import summed as summed
from gdmam_jax._optimizers import weighed as weighed
from gdmam_jax._pairs import GradientPair as GradientPair
from gdmam_jax._pairs import pair_gradients as pair_gradients
from gdmam_jax._pairs import unpair_gradients as unpair_gradients
from gdmam_jax._released import RecentNormState as RecentNormState
from gdmam_jax._released import ReleasedState as ReleasedState
from gdmam_jax._released import clip_by_recent_norm as clip_by_recent_norm
from gdmam_jax._released import gdmam_released as gdmam_released
from gdmam_jax._remembering import RememberingWeighting as RememberingWeighting
from gdmam_jax._remembering import normalised_weighting as normalised_weighting
from gdmam_jax._remembering import running_weighting as running_weighting
from gdmam_jax._running import gradient_norm_weighting as gradient_norm_weighting
from gdmam_jax._running import gradnorm_weighting as gradnorm_weighting
from gdmam_jax._running import gradvac_weighting as gradvac_weighting
from gdmam_jax._running import pcd_weighting as pcd_weighting
from gdmam_jax._scopes import Scope as Scope
from gdmam_jax._scopes import leaf_scope as leaf_scope
from gdmam_jax._transform import GDMAMState as GDMAMState
from gdmam_jax._transform import scale_by_gdmam as scale_by_gdmam
from gdmam_jax._valued import dwa_weighting as dwa_weighting
from gdmam_jax._valued import famo_weighting as famo_weighting
from gdmam_jax._valued import geometric_mean_weighting as geometric_mean_weighting
from gdmam_jax._valued import random_weighting as random_weighting
from gdmam_jax._valued import relobralo_weighting as relobralo_weighting
from gdmam_jax._valued import softadapt_weighting as softadapt_weighting
from gdmam_jax._valued import stch_weighting as stch_weighting
from gdmam_jax._valued import uncertainty_weighting as uncertainty_weighting
from gdmam_jax._weightings import Weighting as Weighting
from gdmam_jax._weightings import aligned_mtl_weighting as aligned_mtl_weighting
from gdmam_jax._weightings import balanced_weighting as balanced_weighting
from gdmam_jax._weightings import cagrad_weighting as cagrad_weighting
from gdmam_jax._weightings import config_weighting as config_weighting
from gdmam_jax._weightings import constant_weighting as constant_weighting
from gdmam_jax._weightings import dcgd_weighting as dcgd_weighting
from gdmam_jax._weightings import dual_proj_weighting as dual_proj_weighting
from gdmam_jax._weightings import fairgrad_weighting as fairgrad_weighting
from gdmam_jax._weightings import imtl_g_weighting as imtl_g_weighting
from gdmam_jax._weightings import mean_weighting as mean_weighting
from gdmam_jax._weightings import mgda_weighting as mgda_weighting
from gdmam_jax._weightings import nash_mtl_weighting as nash_mtl_weighting
from gdmam_jax._weightings import norm_weighting as norm_weighting
from gdmam_jax._weightings import pcgrad_weighting as pcgrad_weighting
from gdmam_jax._weightings import sum_weighting as sum_weighting
from gdmam_jax._weightings import unit_weighting as unit_weighting
from gdmam_jax._weightings import upgrad_weighting as upgrad_weighting
from gdmam_jax._wrappers import over_pairs as over_pairs

try:
    __version__ = _metadata.version("gdmam-jax")
except _metadata.PackageNotFoundError:  # run from the source folder
    __version__ = "0"
