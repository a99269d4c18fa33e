"""What happened at the last step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._allocation import Allocation
from gdmam_jax._geometry import ALIGNMENT_SCALARS
from gdmam_jax._momenta import COMPONENTS, NormStatistics
from gdmam_jax._pairs import is_nnx_variable, named_leaves
from gdmam_jax._released import ReleasedState
from gdmam_jax._transform import GDMAMState


def diagnostics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The last step's scalars, found anywhere inside a nested optimizer state.

    Works on concrete states, and inside a compiled step that returns the result as metrics. An
    optimizer that was told how many losses there are learns their names at the first step, but
    ``jax.jit(diagnostics)`` keeps the keys of the first state that it was given, perhaps numbers.
    An optimizer that is given the names has them from the start.

    Args:
      opt_state: a state that holds one of GDMAM's, however deep.

    Returns:
      A dictionary of scalars: ``cosine``, ``projection``, ``prediction_norm``, ``alignment_norm``,
      ``parallel_norm``, ``orthogonal_norm``, ``prediction_weight``, ``alignment_weight``,
      ``gate`` (the parallel part's factor), ``orthogonal_gate``, ``prediction_momentum``,
      ``parallel_momentum``, ``orthogonal_momentum``; for the released form also ``decay`` (its
      ``b1``), with ``not_finite="skip"`` also ``skipped``, the steps left out, and
      ``skipped_in_a_row``, the steps in a row that were not finite, also those taken after
      ``max_skips``, and with ``"skip_loss"`` how often each loss was left out,
      ``skipped/prediction`` and so on. `allocate` and `weighed` have no momenta. With several
      alignment losses, keys that each loss has end with ``/`` and its name or number; with several
      scopes each key starts with ``label/``; with several GDMAM states, with the state's path in
      ``opt_state``. Before the first step all are 0, except the momenta, which are 1. After a
      skipped step they are those of the last step that was not skipped.

    Raises:
      ValueError: no state of GDMAM, `allocate` or `weighed` is inside ``opt_state``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.gdmam(0.1)
      >>> w = jnp.zeros(2)
      >>> pair = gdmam.GradientPair(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
      >>> _, state = optimizer.update(pair, optimizer.init(w), w)
      >>> round(float(gdmam.diagnostics(state)["cosine"]), 4)
      0.7071
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, GDMAMState | ReleasedState | Allocation)

    found = [
        (name, node) for name, node in named_leaves(opt_state, is_leaf=is_state) if is_state(node)
    ]
    if not found:
        raise ValueError(
            "no GDMAM state found: expected the state of an optimizer with allocate, "
            "scale_by_gdmam, gdmam, gdmam_released or weighed in it, got "
            f"{type(opt_state).__name__}; summed measures nothing: use "
            "weighed(optimizer, sum_weighting)"
        )
    report = {}
    for path, state in found:
        # An nnx.Optimizer keeps each array in a variable.
        state = jax.tree.map(
            lambda leaf: leaf[...] if is_nnx_variable(leaf) else leaf,
            state,
            is_leaf=is_nnx_variable,
        )
        prefix = f"{path}/" if len(found) > 1 else ""
        allocation = state if isinstance(state, Allocation) else state.allocation
        labels = allocation.scopes.labels
        statistics = None if isinstance(state, Allocation) else state.statistics
        for name, value in _scalars(allocation, statistics).items():
            if labels:
                for number, label in enumerate(labels):
                    report[f"{prefix}{label}/{name}"] = value[..., number]
            else:
                report[f"{prefix}{name}"] = value
        if isinstance(state, ReleasedState):
            report[f"{prefix}decay"] = state.decay
        report |= {f"{prefix}{name}": count for name, count in _skips(allocation).items()}
    return report


def _scalars(allocation: Allocation, statistics: NormStatistics | None) -> dict[str, jax.Array]:
    geometry = allocation.geometry
    own = {name: getattr(geometry, name) for name in ALIGNMENT_SCALARS}
    own |= {
        "gate": allocation.gate[..., 0, :],
        "orthogonal_gate": allocation.gate[..., 1, :],
        "alignment_weight": allocation.weights[..., 1:],
    }
    scalars = {
        "prediction_norm": geometry.prediction_norm,
        "prediction_weight": allocation.weights[..., 0],
    }
    count = own["gate"].shape[-1]
    if statistics is not None:
        scalars["prediction_momentum"] = statistics.momentum[..., 0]
        for position, name in enumerate(COMPONENTS[1:]):
            first = 1 + position * count
            own[f"{name}_momentum"] = statistics.momentum[..., first : first + count]
    for name, values in own.items():
        for suffix, each in zip(_suffixes(allocation), jnp.moveaxis(values, -1, 0), strict=True):
            scalars[f"{name}{suffix}"] = each
    return scalars


def _suffixes(allocation: Allocation) -> list[str]:
    """What the keys of each alignment loss end with."""
    count = allocation.gate.shape[-1]
    if count == 1 and not allocation.names.values:
        return [""]
    return [f"/{name}" for name in allocation.names.values or range(count)]


def _skips(allocation: Allocation) -> dict[str, jax.Array]:
    if allocation.skipped is None:
        return {}
    counts = {
        "skipped": allocation.skipped,
        "skipped_in_a_row": allocation.skipped_in_a_row,
    }
    if allocation.skipped_losses is not None:
        names = ["prediction", *(suffix[1:] or "alignment" for suffix in _suffixes(allocation))]
        for number, name in enumerate(names):
            counts[f"skipped/{name}"] = allocation.skipped_losses[..., number]
    return counts
