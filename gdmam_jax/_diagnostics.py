"""What happened at the last step."""

from typing import Any

import jax
import optax

from gdmam_jax._allocation import COMPONENTS, Allocation
from gdmam_jax._geometry import ALIGNMENT_SCALARS
from gdmam_jax._optimizers import WeighedState
from gdmam_jax._pairs import is_nnx_variable, named_leaves
from gdmam_jax._released import ReleasedState
from gdmam_jax._transform import GDMAMState


def diagnostics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The last step's scalars, found anywhere inside a nested optimizer state.

    Works on concrete states, and inside a compiled step that returns the result as metrics.

    Args:
      opt_state: a state that holds one of GDMAM's, however deep.

    Returns:
      A dictionary of scalars: ``cosine``, ``projection``, ``prediction_norm``, ``alignment_norm``,
      ``parallel_norm``, ``orthogonal_norm``, ``prediction_weight``, ``alignment_weight``,
      ``gate`` (the parallel part's factor), ``orthogonal_gate``, ``prediction_momentum``,
      ``parallel_momentum``, ``orthogonal_momentum``; for the released form also ``decay`` (its
      ``b1``), with ``not_finite="skip"`` also ``skipped`` and ``skipped_in_a_row``, counts of
      steps. `weighed` has no momenta. With several alignment losses, the keys of what each has its
      own of end with ``/`` and its name or number; with several scopes each key starts with
      ``label/``; with several GDMAM states, with the state's path in ``opt_state``. All are 0 but
      the momenta before the first step. They are those of the last step that was not skipped.

    Raises:
      ValueError: no state of GDMAM or `weighed` is inside ``opt_state``.

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
        return isinstance(node, GDMAMState | ReleasedState | WeighedState)

    found = [
        (name, node) for name, node in named_leaves(opt_state, is_leaf=is_state) if is_state(node)
    ]
    if not found:
        raise ValueError(
            "no GDMAM state found: expected the state of an optimizer with scale_by_gdmam, gdmam, "
            f"gdmam_released or weighed in it, got {type(opt_state).__name__}"
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
        labels = state.allocation.scopes.labels
        for name, value in _scalars(state.allocation).items():
            if isinstance(state, WeighedState) and name.split("/")[0].endswith("_momentum"):
                continue  # The wrapped optimizer has its own.
            if labels:
                for number, label in enumerate(labels):
                    report[f"{prefix}{label}/{name}"] = value[..., number]
            else:
                report[f"{prefix}{name}"] = value
        if isinstance(state, ReleasedState):
            report[f"{prefix}decay"] = state.decay
        if isinstance(state, GDMAMState) and state.skipped is not None:
            report[f"{prefix}skipped"] = state.skipped
            report[f"{prefix}skipped_in_a_row"] = state.skipped_in_a_row
    return report


def _scalars(allocation: Allocation) -> dict[str, jax.Array]:
    geometry, momentum = allocation.geometry, allocation.statistics.momentum
    own = {name: getattr(geometry, name) for name in ALIGNMENT_SCALARS}
    own |= {
        "gate": allocation.gate[..., 0, :],
        "orthogonal_gate": allocation.gate[..., 1, :],
        "alignment_weight": allocation.weights[..., 1:],
    }
    count = own["gate"].shape[-1]
    for position, name in enumerate(COMPONENTS[1:]):
        own[f"{name}_momentum"] = momentum[..., 1 + position * count : 1 + (position + 1) * count]
    scalars = {
        "prediction_norm": geometry.prediction_norm,
        "prediction_weight": allocation.weights[..., 0],
        "prediction_momentum": momentum[..., 0],
    }
    for name, values in own.items():
        for number in range(count):
            suffix = f"/{allocation.names.values[number]}" if allocation.names.values else ""
            scalars[f"{name}{suffix}"] = values[..., number]
    return scalars
