"""Pictures of what GDMAM did during a training. Needs matplotlib: the extra `plotting`."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gdmam_jax._geometry import ALIGNMENT_SCALARS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Iterable[Mapping[str, Any]] | Mapping[str, ArrayLike]
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

    With several scopes or alignment losses each has its own colour, and each scalar its own dashes.
    Of more than 10 the colours repeat, without a legend: see `plot_scopes`.

    Args:
      history: see `History`. Keys that are not GDMAM's are ignored.
      steps: at which steps, shape ``(n,)``. None: 0, 1, ...

    Returns:
      A matplotlib figure, a panel for each kind of scalar that the history has.

    Raises:
      ValueError: the history is empty, its entries differ in GDMAM's keys, a value is not a scalar
        of each step, none is one of GDMAM's, or ``steps`` has another length.

    Examples:
      >>> history = {"cosine": [0.1, -0.2], "prediction_norm": [1.0, 0.9]}
      >>> [axes.get_title() for axes in plot_diagnostics(history).axes]
      ['cosine of the angle', 'norms of the gradients']
    """
    import matplotlib.pyplot as plt

    scalars = _read(history, [*itertools.chain(*PANELS.values())])
    count = scalars[0].values.size
    steps = np.arange(count) if steps is None else np.asarray(steps)
    if steps.shape != (count,):
        raise ValueError(f"steps must have shape ({count},) as the history, got {steps.shape}")
    panels = {
        title: lines
        for title, names in PANELS.items()
        if (lines := [scalar for scalar in scalars if scalar.name in names])
    }
    owners = list(dict.fromkeys(scalar.owner for scalar in scalars))
    several, named = len(owners) > 1, 1 < len(owners) <= 10  # The colours repeat after 10.
    size = (8 + named * max(map(len, owners)) / 15, 1 + 1.7 * len(panels))
    figure, grid = plt.subplots(len(panels), sharex=True, figsize=size, layout="constrained")
    of_owner: dict[str, Any] = {}
    for axes, (title, lines) in zip(np.atleast_1d(grid), panels.items(), strict=True):
        of_scalar: dict[str, Any] = {}
        for scalar in lines:
            number = PANELS[title].index(scalar.name)
            color = f"C{owners.index(scalar.owner) if several else number}"
            style = ("-", "--", ":")[number if several else 0]
            style += "os^"[number] if count == 1 else ""
            (line,) = axes.plot(steps, scalar.values, style, color=color, label=scalar.key)
            of_scalar.setdefault(scalar.name if several else scalar.key, line)
            of_owner.setdefault(scalar.owner, line)
        axes.set_title(title)
        if title in LOGARITHMIC and all((scalar.values > 0).any() for scalar in lines):
            axes.set_yscale("log")
        if title == "cosine of the angle":
            axes.axhline(0, color="black", linewidth=0.5)
            axes.set_ylim(-1.05, 1.05)
        legend = axes.legend(
            of_scalar.values(), of_scalar, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1)
        )
        if several:
            plt.setp(legend.legend_handles, color="black")
    if named:
        figure.legend(of_owner.values(), of_owner, fontsize="small", loc="outside right upper")
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

    rows = {s.owner: s.values for s in _read(history, [name]) if s.scope is not None}
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


class _Scalar(NamedTuple):
    key: str
    values: NDArray[Any]
    name: str
    scope: str | None
    owner: str


def _read(history: History, names: Collection[str]) -> list[_Scalar]:
    """The scalars of these names, each with one number for each step."""
    if not isinstance(history, Mapping):
        entries = list(history)
        keys = dict.fromkeys(itertools.chain(*entries))
        for number, entry in enumerate(entries):
            lacking = [key for key in keys if key not in entry and _split(key, keys)[0] in names]
            if lacking:
                raise ValueError(f"entry {number} of the history lacks {lacking}")
        series: dict[str, Any] = {key: [entry.get(key) for entry in entries] for key in keys}
        return _read(series, names)
    scalars = [
        _Scalar(key, np.asarray(values, float), *parts)
        for key, values in history.items()
        if (parts := _split(key, history))[0] in names
    ]
    if history and not scalars:
        raise ValueError(f"the history has none of {', '.join(names)}: {', '.join(history)}")
    if not scalars or not scalars[0].values.size:
        raise ValueError("the history is empty")
    count = scalars[0].values.size
    for key, values, *_ in scalars:
        if values.shape != (count,):
            raise ValueError(f"{key} must be one number a step, ({count},), got {values.shape}")
    return scalars


def _split(key: str, keys: Collection[str]) -> tuple[str, str | None, str]:
    """The scalar's name in a key of `diagnostics`, its scope's label, and whose it is.

    A layer or a loss can be named like a scalar, but each scope has a ``prediction_norm``.
    """
    parts = key.split("/")
    found = [number for number, part in enumerate(parts) if part in KNOWN]
    if not found:
        return "", None, ""
    scopes = (n for n in reversed(found) if "/".join([*parts[:n], "prediction_norm"]) in keys)
    number = next(scopes, found[0])
    scope, loss = "/".join(parts[:number]), "/".join(parts[number + 1 :])
    if not number:
        return parts[0], None, loss or "prediction"
    return parts[number], scope, f"{scope} ({loss})" if loss else scope
