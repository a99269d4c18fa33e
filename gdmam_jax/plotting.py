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
"""What `gdmam_jax.diagnostics` returned at each step.

A list of dictionaries, or one of stacked values, as `jax.lax.scan` gives it."""

PANELS = {
    "cosine of the angle": ("cosine",),
    "norms of the gradients": ("prediction_norm", "alignment_norm"),
    "weights": ("prediction_weight", "alignment_weight"),
    "gate": ("gate", "orthogonal_gate"),
    "momentum": ("prediction_momentum", "parallel_momentum", "orthogonal_momentum"),
}
"""The panels of `plot_diagnostics`, and the scalars in each."""
KNOWN = {*ALIGNMENT_SCALARS, *itertools.chain(*PANELS.values()), "decay"}
"""Names of scalars that exist once for each scope."""
LOGARITHMIC = ("norms of the gradients", "weights")
MATTERS = 0.2
"""The share of the losses' decrease, or of the steps, from which a conflict is said to matter."""
DROWNS = 10
"""The ratio of two gradients' norms from which the longer is said to drown the other."""


def plot_diagnostics(history: History, *, steps: ArrayLike | None = None) -> "Figure":
    """Draws angle, norms, weights, gate and momentum over the steps.

    With several scopes or alignment losses each has its own colour, and each scalar its own dashes.
    With more than 10 the colours repeat, and no legend names them: use `plot_scopes`.

    Args:
      history: see `History`. Keys that are not GDMAM's are ignored.
      steps: the number of the step at which each entry was recorded, increasing, shape ``(n,)``.
        None: 0, 1, ...

    Returns:
      A matplotlib figure, a panel for each kind of scalar that the history has.

    Raises:
      ValueError: the history is empty, its entries differ in GDMAM's keys, a value is not one
        scalar for each step, no key is one of GDMAM's, or ``steps`` has another length or does not
        increase.
      TypeError: an entry of the history is not a dictionary.

    Examples:
      >>> history = {"cosine": [0.1, -0.2], "prediction_norm": [1.0, 0.9]}
      >>> [axes.get_title() for axes in plot_diagnostics(history).axes]
      ['cosine of the angle', 'norms of the gradients']
    """
    import matplotlib.pyplot as plt

    scalars = _read(history, [*itertools.chain(*PANELS.values())])
    count = scalars[0].values.size
    steps = _numbers(steps, count)
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


def plot_scopes(
    history: History,
    name: str = "cosine",
    *,
    steps: ArrayLike | None = None,
    axes: "Axes | None" = None,
) -> "Figure":
    """Draws one scalar of every scope over the steps: a row for each scope, a colour for its value.

    With ``scope=leaf_scope`` it shows the conflict by layer.

    Args:
      history: see `History`, of an optimizer with several scopes.
      name: the scalar, such as ``"cosine"`` or ``"alignment_norm"``.
      steps: see `plot_diagnostics`.
      axes: where to draw; None: in a new figure.

    Returns:
      The figure.

    Raises:
      ValueError: see `plot_diagnostics`; or no scope has a scalar of this name.
      TypeError: an entry of the history is not a dictionary.

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
    values = np.stack(list(rows.values()))
    at = _numbers(steps, values.shape[1])
    half = np.diff(at) / 2 if at.size > 1 else np.array([0.5])
    edges = np.concatenate([at[:1] - half[:1], at[:-1] + half, at[-1:] + half[-1:]])
    if axes is None:
        _, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    limits: dict[str, Any] = {"vmin": -1, "vmax": 1, "cmap": "RdBu"} if name == "cosine" else {}
    image = axes.pcolorfast(edges, np.arange(len(rows) + 1) - 0.5, values, **limits)
    axes.invert_yaxis()
    axes.set(title=f"{name} by scope", xlabel="step", yticks=range(len(rows)), yticklabels=[*rows])
    axes.figure.colorbar(image, ax=axes)
    return axes.figure  # type: ignore[return-value]


class ConflictReport(NamedTuple):
    r"""What `conflict_report` found.

    Attributes:
      verdict: in words.
      cosine: of the two gradients over the whole training,
        $\sum_t \langle g_p, g_a\rangle / \sqrt{\sum_t |g_p|^2 \sum_t |g_a|^2}$.
      cancelled: the share of the losses' decrease that their conflict cancels in the sum, 0 to 1.
      raised: the share of the steps on which the sum raises the prediction loss.
      ratio: the median of the weighed alignment gradient's norm over the prediction gradient's.
      figure: smoothed cosines, norms and cancelled shares over the steps; a matplotlib figure.
    """

    verdict: str
    cosine: float
    cancelled: float
    raised: float
    ratio: float
    figure: "Figure"


def conflict_report(
    history: History,
    *,
    alignment_weight: float = 1.0,
    loss: str | None = None,
    window: int | None = None,
    steps: ArrayLike | None = None,
) -> ConflictReport:
    r"""Is there conflict between two losses, and does it matter?

    Looks at the sum $l_p + w l_a$, whose gradient is $d = g_p + w g_a$. A small step along it
    lowers the sum by $|d|^2 = |g_p|^2 + w^2 |g_a|^2 + 2 w \langle g_p, g_a\rangle$. If the last
    term is negative, it cancels a part of the others. Cosines of single batches are mostly noise,
    so inner products and squared norms are averaged over steps first. The verdict is only about
    gradients: if the sum is itself the objective, such as an ELBO, it is still right to add the
    losses.

    Args:
      history: see `History`; of one scope and any method, such as Adam on the sum,
        ``weighed(optax.adam(rate), sum_weighting)``. Steps with a value that is not finite are left
        out.
      alignment_weight: $w$, greater than 0.
      loss: the alignment loss's name, if there are several.
      window: over how many entries of the history to average; None: a twentieth of all.
      steps: see `plot_diagnostics`; only the figure depends on it.

    Returns:
      A `ConflictReport`.

    Raises:
      ValueError: the history is empty or lacks the cosines or norms of the losses, a gradient is 0
        or not finite at every step, the window is less than 1, the weight is not positive, or
        ``steps`` does not fit: see `plot_diagnostics`.
      TypeError: an entry of the history is not a dictionary.

    Examples:
      >>> cosines = {"cosine": [-0.5, -0.7, -0.6, -0.6]}
      >>> norms = {"prediction_norm": [1.0] * 4, "alignment_norm": [1.2, 1.0, 1.1, 0.9]}
      >>> print(conflict_report(cosines | norms).verdict)
      Conflict, and it matters: the sum cancels 59% of the decrease.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if not alignment_weight > 0:
        raise ValueError(f"alignment_weight must be greater than 0, got {alignment_weight}")
    ending = "" if loss is None else f"/{loss}"
    keys = (f"cosine{ending}", "prediction_norm", f"alignment_norm{ending}")
    found = {
        scalar.key: scalar.values for scalar in _read(history, [k.split("/")[0] for k in keys])
    }
    if lacking := [key for key in keys if key not in found]:
        raise ValueError(
            f"the history lacks {', '.join(lacking)}; if there are several losses, name one with "
            f"loss=; several scopes cannot be reported. It has {', '.join(found)}"
        )
    entries = np.stack([found[key] for key in keys])
    finite = np.isfinite(entries).all(axis=0)
    at, entries = _numbers(steps, finite.size)[finite], entries[:, finite]
    if not (entries[1:] > 0).any(axis=1).all():
        raise ValueError(
            "one of the gradients is 0 or not finite at every step of the history: there is "
            "nothing to compare"
        )
    cosines, prediction, alignment = entries
    alignment = alignment_weight * alignment
    terms = np.stack([prediction * alignment * cosines, prediction**2, alignment**2])
    smooth = np.stack([_smooth(term, window or max(1, cosines.size // 20)) for term in terms])
    total = np.sum(terms, axis=1, keepdims=True)
    cosine, cancelled = (float(each[0]) for each in _cosine_and_cancelled(total))
    raised = float(np.mean(smooth[0] + smooth[1] < 0))
    both = (smooth[1:] > 0).all(axis=0)
    ratio = float(np.median(np.sqrt(smooth[2, both] / smooth[1, both]))) if both.any() else 1.0
    verdict = _verdict(cancelled, raised, ratio)
    figure = _draw_conflict(at, cosines, smooth, verdict)
    return ConflictReport(verdict, cosine, cancelled, raised, ratio, figure)


def _smooth(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Means over a window, which is shorter at the ends."""
    window = min(window, values.size)
    ends = window // 2, (window - 1) // 2
    total, count = (_sums(np.pad(each, ends), window) for each in (values, np.ones_like(values)))
    return np.asarray(total / count)


def _sums(values: NDArray[Any], window: int) -> NDArray[Any]:
    """Sums of every `window` neighbours, of those of its halves: a running sum would cancel."""
    if window == 1:
        return values
    half = window // 2
    halves = _sums(values, half)
    even = halves[:-half] + halves[half:]
    return even[:-1] + values[2 * half :] if window % 2 else even


def _cosine_and_cancelled(terms: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """From mean inner products and squared norms of shape ``(3, ...)``."""
    product, first, second = terms
    cosine = product / np.maximum(np.sqrt(first * second), 1e-300)
    return cosine, np.maximum(-2 * product, 0) / np.maximum(first + second, 1e-300)


def _verdict(cancelled: float, raised: float, ratio: float) -> str:
    if cancelled >= MATTERS or raised >= MATTERS:
        climbs = f", and raises the prediction loss on {raised:.0%} of the steps" * (raised > 0)
        return f"Conflict, and it matters: the sum cancels {cancelled:.0%} of the decrease{climbs}."
    if not 1 / DROWNS <= ratio <= DROWNS:
        longer, shorter = ("alignment", "prediction")[:: 1 if ratio > 1 else -1]
        times = max(ratio, 1 / max(ratio, 1e-300))
        return (
            f"The lengths matter, not the angle: the {longer} gradient is {times:.3g} times as "
            f"long, and drowns out the {shorter} gradient in the sum."
        )
    if cancelled >= MATTERS / 4:
        return f"Some conflict: the sum cancels {cancelled:.0%} of the decrease. Try GDMAM, too."
    return (
        f"No conflict that matters: the sum cancels {cancelled:.0%} of the decrease. Keep the sum."
    )


def _draw_conflict(
    at: NDArray[Any], cosines: NDArray[Any], smooth: NDArray[Any], verdict: str
) -> "Figure":
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(3, sharex=True, figsize=(8, 6.5), layout="constrained")
    of_angle, of_norms, of_shares = grid
    cosine, cancelled = _cosine_and_cancelled(smooth)
    of_angle.plot(at, cosines, ".", color="C0", alpha=0.2, markersize=3, label="of single batches")
    of_angle.plot(at, cosine, color="C0", label="smoothed")
    of_angle.axhline(0, color="black", linewidth=0.5)
    of_angle.set(title="cosine of the angle", ylim=(-1.05, 1.05))
    for square, name in zip(smooth[1:], ("prediction", "alignment, weighed"), strict=True):
        of_norms.plot(at, np.sqrt(square), label=name)
    of_norms.set_title("norms of the gradients")
    if (smooth[1:] > 0).any(axis=1).all():
        of_norms.set_yscale("log")
    of_shares.fill_between(at, 100 * cancelled, color="C3", alpha=0.5)
    of_shares.set(title="cancelled by the sum, % of the decrease", ylim=(0, 100), xlabel="step")
    for axes in (of_angle, of_norms):
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(verdict, fontsize="medium", wrap=True)
    return figure


def _numbers(steps: ArrayLike | None, count: int) -> NDArray[Any]:
    """The number of the step of each entry of the history."""
    numbers = np.arange(count) if steps is None else np.asarray(steps)
    if numbers.shape != (count,):
        raise ValueError(f"steps must have shape ({count},) as the history, got {numbers.shape}")
    if not (np.diff(numbers) > 0).all():
        raise ValueError("steps must increase from each entry of the history to the next")
    return numbers


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
        for number, entry in enumerate(entries):
            if not isinstance(entry, Mapping):
                raise TypeError(
                    f"entry {number} of the history is {type(entry).__name__}; expected what "
                    "gdmam.diagnostics(opt_state) returns at each step"
                )
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
