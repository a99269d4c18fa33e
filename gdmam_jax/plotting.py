"""Pictures of what GDMAM did during a training. Needs matplotlib: the extra `plotting`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdmam_jax._geometry import ALIGNMENT_SCALARS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]] | Mapping[str, ArrayLike]
"""What `gdmam_jax.diagnostics` returned at each step: a list of dictionaries, or one dictionary of
stacked values, as `jax.lax.scan` gives it."""

PANELS = {
    "cosine of the angle": ("cosine",),
    "norms of the gradients": ("prediction_norm", "alignment_norm"),
    "weights": ("prediction_weight", "alignment_weight"),
    "gate": ("gate", "orthogonal_gate"),
    "momentum": ("prediction_momentum", "parallel_momentum", "orthogonal_momentum"),
}
"""The panels of `plot_diagnostics`, and the scalars in each."""
KNOWN = {*ALIGNMENT_SCALARS, *itertools.chain(*PANELS.values()), "decay"}
"""Names of scalars that each scope has its own of."""
LOGARITHMIC = ("norms of the gradients", "weights")


def plot_diagnostics(history: History, *, steps: ArrayLike | None = None) -> "Figure":
    """Draws angle, norms, weights, gate and momentum over the steps.

    Args:
      history: see `History`. With several scopes and alignment losses each has its own line.
      steps: at which steps, shape ``(n,)``. None: 0, 1, ...

    Returns:
      A matplotlib figure, a panel for each kind of scalar that the history has.

    Raises:
      ValueError: the history is empty, its entries differ in their keys, a value is not a scalar of
        each step, or none is one of GDMAM's.

    Examples:
      >>> history = {"cosine": [0.1, -0.2], "prediction_norm": [1.0, 0.9]}
      >>> [axes.get_title() for axes in plot_diagnostics(history).axes]
      ['cosine of the angle', 'norms of the gradients']
    """
    import matplotlib.pyplot as plt

    values, steps = _stacked(history), None if steps is None else np.asarray(steps)
    panels = {
        title: {key: series for key, series in values.items() if _name(key)[1] in names}
        for title, names in PANELS.items()
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        raise ValueError(f"the history has none of GDMAM's scalars: {', '.join(values)}")
    figure, grid = plt.subplots(
        len(panels), sharex=True, figsize=(8, 1 + 1.7 * len(panels)), layout="constrained"
    )
    for axes, (title, lines) in zip(np.atleast_1d(grid), panels.items(), strict=True):
        for key, series in lines.items():
            axes.plot(np.arange(len(series)) if steps is None else steps, series, label=key)
        axes.set_title(title)
        if title in LOGARITHMIC and all((series > 0).any() for series in lines.values()):
            axes.set_yscale("log")
        if title == "cosine of the angle":
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set_ylim(-1.05, 1.05)
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xlabel("step")
    return figure


def plot_scopes(history: History, name: str = "cosine", *, axes: "Axes | None" = None) -> "Figure":
    """Draws one scalar of every scope over the steps: a row for each scope, a colour for its value.

    With ``scope=leaf_scope`` that is conflict by layer.

    Args:
      history: see `History`, of an optimizer with several scopes.
      name: the scalar, such as ``"cosine"`` or ``"alignment_norm"``.
      axes: where to draw; None: on a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: see `plot_diagnostics`; or no scope has a scalar of this name.

    Examples:
      >>> history = {"a/cosine": [0.1, -0.2], "b/cosine": [0.3, 0.4]}
      >>> figure = plot_scopes(history)
      >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
      ['a', 'b']
    """
    import matplotlib.pyplot as plt

    rows = {}
    for key, series in _stacked(history).items():
        scope, found, loss = _name(key)
        if found == name and scope:
            rows[f"{scope} ({loss})" if loss else scope] = series
    if not rows:
        raise ValueError(f"no scope has a {name!r} in the history; give the optimizer a scope")
    if axes is None:
        _, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    limits: dict[str, Any] = {"vmin": -1, "vmax": 1, "cmap": "RdBu"} if name == "cosine" else {}
    image = axes.imshow(
        np.stack(list(rows.values())), aspect="auto", interpolation="nearest", **limits
    )
    axes.set(title=f"{name} by scope", xlabel="step", yticks=range(len(rows)), yticklabels=[*rows])
    axes.figure.colorbar(image, ax=axes)
    return axes.figure  # type: ignore[return-value]


def _stacked(history: History) -> dict[str, NDArray[Any]]:
    if isinstance(history, Mapping):
        values = {key: np.asarray(series, float) for key, series in history.items()}
    else:
        if not history:
            raise ValueError("the history is empty")
        for number, entry in enumerate(history):
            if entry.keys() != history[0].keys():
                different = sorted(entry.keys() ^ history[0].keys())
                raise ValueError(
                    f"entry {number} of the history differs from the first: {different}"
                )
        values = {key: np.asarray([entry[key] for entry in history], float) for key in history[0]}
    for key, series in values.items():
        if series.ndim != 1:
            raise ValueError(
                f"{key} must be one number a step, got shape {series.shape} for the whole history"
            )
    return values


def _name(key: str) -> tuple[str, str, str]:
    """The scope's label, the scalar's name and the alignment loss of a key of `diagnostics`."""
    parts = key.split("/")
    for number, part in enumerate(parts):
        if part in KNOWN:
            return "/".join(parts[:number]), part, "/".join(parts[number + 1 :])
    return "", key, ""
