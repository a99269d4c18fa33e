"""What happened at the last step."""

from typing import Any

import jax
import optax

from gdmam_jax.allocation import COMPONENTS, Allocation
from gdmam_jax.pairs import named_leaves
from gdmam_jax.released import ReleasedState
from gdmam_jax.transform import GDMAMState


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
      ``b1``). With several scopes each key starts with ``label/``; with several GDMAM states, with
      the state's path in ``opt_state``. All are 0 but the momenta before the first step.

    Raises:
      ValueError: no GDMAM state is inside ``opt_state``.

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
        return isinstance(node, GDMAMState | ReleasedState)

    found = [
        (name, node) for name, node in named_leaves(opt_state, is_leaf=is_state) if is_state(node)
    ]
    if not found:
        raise ValueError(
            "no GDMAM state found: expected the state of an optimizer with scale_by_gdmam, gdmam "
            f"or gdmam_released in it, got {type(opt_state).__name__}"
        )
    report = {}
    for path, state in found:
        prefix = f"{path}/" if len(found) > 1 else ""
        scalars = _scalars(state.allocation)
        labels = state.allocation.scopes.labels
        for name, value in scalars.items():
            if labels:
                for number, label in enumerate(labels):
                    report[f"{prefix}{label}/{name}"] = value[..., number]
            else:
                report[f"{prefix}{name}"] = value
        if isinstance(state, ReleasedState):
            report[f"{prefix}decay"] = state.decay
    return report


def _scalars(allocation: Allocation) -> dict[str, jax.Array]:
    geometry = allocation.geometry
    scalars = {
        "cosine": geometry.cosine,
        "gate": allocation.gate[..., 0],
        "orthogonal_gate": allocation.gate[..., 1],
        "prediction_weight": allocation.weights[..., 0],
        "alignment_weight": allocation.weights[..., 1],
    }
    for number, name in enumerate(COMPONENTS):
        scalars[f"{name}_momentum"] = allocation.statistics.momentum[..., number]
    for name in ("prediction_norm", "alignment_norm", "parallel_norm", "orthogonal_norm"):
        scalars[name] = getattr(geometry, name)
    scalars["projection"] = geometry.projection
    return scalars
