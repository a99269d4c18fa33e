"""Pictures of an experiment's report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl.laboratory.results import Experiment, Result

PICTURES = {
    "kld": "KLD over epochs: on the validation rows, on natural rows, and on the test folds",
    "conflict": "Conflict: cosine between the two gradients, and the gate's factors",
    "allocation": "Task weights and momenta over training",
    "head_tail": "Euclidean distance on head and tail labels",
    "distributions": "True and predicted distributions, first test rows",
}
"""The pictures of a report, and their captions."""

DIAGNOSTICS = {
    "conflict": {
        "cosine": "cosine",
        "gate": "gate, parallel",
        "orthogonal_gate": "gate, orthogonal",
    },
    "allocation": {
        "prediction_weight": "weight, prediction",
        "alignment_weight": "weight, alignment",
        "prediction_momentum": "momentum, prediction",
        "parallel_momentum": "momentum, parallel",
        "orthogonal_momentum": "momentum, orthogonal",
    },
}
"""What the pictures of diagnostics show, with titles."""

Curves = dict[str, dict[str, NDArray[Any]]]


def draw(
    experiment: Experiment, home: Path, selected: str, tuning: str | None = None
) -> dict[str, Path]:
    """Draw the `PICTURES` of the trials that count.

    Args:
      experiment: from `results.load`.
      home: where the PNGs go.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      The PNGs' paths by name; a picture of diagnostics that no method has is left out.
    """
    methods = experiment.methods
    curves = {result.name: result.chosen(selected, tuning).history for result in methods}
    import matplotlib as mpl

    with mpl.rc_context(
        {
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "figure.constrained_layout.use": True,
            "figure.dpi": 110,
            "font.size": 9,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    ):
        figures = {
            "kld": _kld(experiment, curves),
            **{name: _diagnostics(methods, curves, keys) for name, keys in DIAGNOSTICS.items()},
            "head_tail": _head_tail(methods, selected, tuning),
            "distributions": _distributions(experiment, selected, tuning),
        }
        paths = {}
        for name, figure in figures.items():
            if figure is not None:
                paths[name] = home / f"{name}.png"
                figure.savefig(paths[name], metadata={"Software": None})
    return paths


def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _kld(experiment: Experiment, curves: Curves) -> Any:
    figure, axes = _figure(1, 3, 13, 4)
    configuration = experiment.facts["configuration"]
    epochs, chunk = configuration["epochs"], configuration["chunk"]
    ends = np.minimum(np.arange(chunk, epochs + chunk, chunk), epochs)
    for number, result in enumerate(experiment.methods):
        found = curves[result.name]
        for axis, key, x in (
            (axes[0, 0], "validation_kld", np.arange(1, epochs + 1)),
            (axes[0, 1], "natural_kld", np.arange(1, epochs + 1)),
            (axes[0, 2], "test_kld", ends),
        ):
            axis.plot(x, found[key].mean(0), color=_colour(number), label=result.label, lw=1.2)
    titles = ("validation rows", "natural rows", "test folds")
    for axis, title in zip(axes[0], titles, strict=True):
        # One method that diverges must not flatten all others.
        bottoms = [line.get_ydata() for line in axis.lines]
        finite = [y[np.isfinite(y)] for y in bottoms if np.isfinite(y).any()]
        if finite:
            low = min(y.min() for y in finite)
            high = float(np.median([np.quantile(y, 0.9) for y in finite]))
            axis.set_ylim(low - 0.05 * (high - low), high + 0.6 * (high - low) + 1e-6)
        axis.set(title=title, xlabel="epoch", ylabel="KLD, mean over folds and seeds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _diagnostics(
    methods: Sequence[Result],
    curves: Curves,
    keys: dict[str, str],
) -> Any:
    chosen = [
        (number, result)
        for number, result in enumerate(methods)
        if any(key in curves[result.name] for key in keys)
    ]
    if not chosen:
        return None
    rows = -(-len(keys) // 3)
    figure, axes = _figure(rows, 3, 10, 2.8 * rows)
    for axis in axes.ravel()[len(keys) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.ravel(), keys.items(), strict=False):
        for number, result in chosen:
            column = curves[result.name].get(key)
            if column is None:
                continue
            x, mean = np.arange(1, column.shape[1] + 1), column.mean(0)
            axis.plot(x, mean, color=_colour(number), label=result.label, lw=1.2)
            low, high = np.quantile(column, [0.25, 0.75], axis=0)
            axis.fill_between(x, low, high, color=_colour(number), alpha=0.15, lw=0)
        axis.set(title=title, xlabel="epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _head_tail(methods: Sequence[Result], selected: str, tuning: str | None) -> Any:
    figure, axes = _figure(1, 1, 8, 0.8 + 0.32 * len(methods))
    axis, rows = axes[0, 0], np.arange(len(methods))
    for offset, part, colour in ((-0.19, "head", "C0"), (0.19, "tail", "C1")):
        columns = [result.values(f"euclidean_{part}", selected, tuning) for result in methods]
        axis.barh(
            rows + offset,
            [column.mean() for column in columns],
            0.36,
            xerr=[column.std() for column in columns],
            color=colour,
            error_kw={"lw": 0.8},
            label=part,
        )
    axis.set(yticks=rows, yticklabels=[result.label for result in methods])
    axis.set_xlabel("Euclidean distance, mean ± standard deviation")
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _distributions(experiment: Experiment, selected: str, tuning: str | None) -> Any:
    true, names = np.array(experiment.facts["shown_true"][0]), experiment.facts["data"]["labels"]
    figure, axes = _figure(2, -(-len(true) // 2), 11, 5, sharex=True, sharey=True)
    positions = np.arange(len(names))
    for row, axis in enumerate(axes.ravel()[: len(true)]):
        axis.bar(positions, true[row], color="0.8", label="true")
        for number, result in enumerate(experiment.methods):
            axis.plot(
                positions,
                result.chosen(selected, tuning).results[selected]["shown"][0][row],
                "o-",
                color=_colour(number),
                label=result.label,
                lw=1,
                ms=3,
            )
        axis.set(title=f"test row {row}", xticks=positions, xticklabels=names)
    for axis in axes[-1]:
        axis.set_xlabel("label")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure
