"""What the runs say: a table, curves, and a file with every error."""

import itertools
import json
from collections.abc import Sequence
from csv import DictReader
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.physics.equations import EQUATIONS
from benchmarks.physics.methods import ALL_METHODS

FAILED = 0.5
"""Relative error from which a run counts as failed."""

Records = dict[str, dict[str, dict[str, Any]]]


def load(folder: Path) -> Records:
    """All results in a folder: by equation, then by method, in the order of the registries."""
    records: Records = {}
    for equation in EQUATIONS:
        for method in ALL_METHODS:
            path = folder / f"{equation}-{method.replace(' ', '_')}.json"
            if path.exists():
                records.setdefault(equation, {})[method] = json.loads(path.read_text())
    return records


def finals(record: dict[str, Any]) -> np.ndarray:
    """The final error of each seed; infinite if it is NaN."""
    return np.nan_to_num(np.array(record["errors"])[:, -1], nan=np.inf)


def table(records: Records) -> str:
    """Markdown: median (range) of the final relative errors, failed runs, mean rank, time."""
    methods = list(dict.fromkeys(name for found in records.values() for name in found))
    medians = {
        equation: {name: np.median(finals(record)) for name, record in found.items()}
        for equation, found in records.items()
    }
    lines = [
        f"| method | {' | '.join(records)} | failed | mean rank | worst over best | time |",
        "| --- |" + " ---: |" * (len(records) + 4),
    ]
    times = {name: [] for name in methods}
    for found in records.values():
        for name, record in found.items():
            base = found.get("summed", record)["milliseconds"]
            times[name].append(record["milliseconds"] / base)
    for name in methods:
        cells, ranks, ratios, failed = [], [], [], 0
        for equation, found in records.items():
            if name not in found:
                cells.append("")
                continue
            errors, row = finals(found[name]), medians[equation]
            best = min(row.values())
            text = f"{row[name]:.2g} ({errors.min():.2g} - {errors.max():.2g})"
            cells.append(f"**{text}**" if row[name] == best else text)
            ranks.append(1 + sum(other < row[name] for other in row.values()))
            ratios.append(row[name] / best)
            failed += int(np.sum(errors > FAILED))
        lines.append(
            f"| {name} | {' | '.join(cells)} | {failed} | {np.mean(ranks):.1f} | "
            f"{max(ratios):.1f} | {np.median(times[name]):.2f} |"
        )
    return "\n".join(lines)


def write_csv(folders: Sequence[Records], path: Path) -> None:
    """One line for each run: equation, method, extras, steps, rate, seed, final error.

    Where several folders have the same, rates and seeds aside, the first one's runs count.
    """
    runs: dict[str, list[str]] = {}
    for equation, name, records in itertools.product(EQUATIONS, ALL_METHODS, folders):
        if record := records.get(equation, {}).get(name):
            steps, extras = record["settings"]["scale"]["steps"], record["extras"]
            run, rate = f"{equation},{name},{extras.replace(',', ' ')},{steps}", record["rate"]
            errors = enumerate(finals(record))
            runs.setdefault(run, [f"{run},{rate:g},{seed},{error:.6g}" for seed, error in errors])
    lines = ["equation,method,extras,steps,rate,seed,error", *itertools.chain(*runs.values())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


SHOWN = {
    "summed": "C7",
    "pcgrad": "C1",
    "imtl-g": "C2",
    "config": "C3",
    "m-config": "C4",
    "gdmam": "C0",
}
"""Methods in the picture of errors over the steps, and their colours."""

OPTIMIZERS = {"adamw": "0.4", "muon": "C1", "soap": "C0"}
LINES = {"summed": ":", "gradient norms": "--", "allocated": "-"}
"""In the picture over seconds: optimizers' colours, and the lines of what is in front of them."""

FINALS = (
    "summed", "data x 10", "data x 100", "pcgrad", "imtl-g", "config", "m-config", "gdmam",
    "muon allocated",
)  # fmt: skip
"""Methods in the picture of final errors."""


def draw(records: Records, path: Path) -> None:
    """Errors over the steps by equation, median and range over the seeds; cosines below."""
    columns = min(5, len(records))
    bands = -(-len(records) // columns)
    figure, axes = _axes(2 * bands, columns, 5 * bands, height_ratios=(2, 1) * bands, sharex=True)
    for unused in axes[-2:, (len(records) - 1) % columns + 1 :].flat:
        unused.set_visible(False)
    for number, (equation, found) in enumerate(records.items()):
        band, column = divmod(number, columns)
        upper, lower = axes[2 * band : 2 * band + 2, column]
        for name in [name for name in SHOWN if name in found]:
            steps = _curve(upper, name, found[name])
            if name in ("summed", "gdmam"):
                lower.plot(steps, np.median(found[name]["cosines"], 0), color=SHOWN[name])
        upper.set(title=equation, yscale="log")
        lower.axhline(0, color="black", linewidth=0.5, linestyle=":")
        lower.set(xlabel="step", ylim=(-1, 1))
    for upper, lower in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        upper.set_ylabel("relative error")
        lower.set_ylabel("cosine of the gradients")
    _save(figure, path, axes[0, 0])


def draw_finals(csv: Path, path: Path) -> None:
    """The final error of every run in a file of `write_csv`, by equation and method."""
    runs = _runs(csv, FINALS)
    columns = min(5, len(runs))
    bands = -(-len(runs) // columns)
    figure, axes = _axes(bands, columns, 3 * bands, sharey=True)
    for unused in axes.flat[len(runs) :]:
        unused.set_visible(False)
    for axis, (equation, found) in zip(axes.flat, runs.items(), strict=False):
        for row, name in enumerate(FINALS):
            color = "C0" if name in ("gdmam", "muon allocated") else "C7"
            axis.plot(found[name], [row] * len(found[name]), "o", color=color, alpha=0.4, ms=4)
            axis.plot(np.median(found[name]), row, "|", color=color, ms=14, mew=2)
        axis.set(title=equation, xscale="log", yticks=range(len(FINALS)), yticklabels=FINALS)
        axis.xaxis.set_minor_formatter(lambda value, position: "")
    axes[0, 0].invert_yaxis()
    figure.supxlabel("relative error")
    _save(figure, path)


def draw_over_seconds(records: Records, milliseconds: dict[str, float], path: Path) -> None:
    """Median errors over the time of a training, by equation.

    Args:
      records: of `load`.
      milliseconds: a step's, by method.
      path: of the picture.
    """
    figure, axes = _axes(1, len(records), 3.5, sharex=True)
    for axis, (equation, found) in zip(axes[0], records.items(), strict=True):
        for optimizer, color in OPTIMIZERS.items():
            for front, line in LINES.items():
                name = f"{optimizer} {front}"
                if name in found and name in milliseconds:
                    seconds = 1e-3 * milliseconds[name] * _steps(found[name])
                    errors = np.median(found[name]["errors"], axis=0)
                    axis.plot(seconds, errors, line, color=color, label=name)
        axis.set(title=equation, yscale="log", xlabel="seconds on one core", xlim=(0, None))
    axes[0, 0].set_ylabel("relative error")
    named = max(axes[0], key=lambda axis: len(axis.lines))
    if not named.lines:
        raise ValueError("no optimizer has both results and the time of a step")
    _save(figure, path, named)


def _runs(csv: Path, methods: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """The final errors without extras, of the equations that have all of ``methods``."""
    runs: dict[str, dict[str, list[float]]] = {}
    with csv.open() as lines:
        for run in DictReader(lines):
            if not run["extras"]:
                found = runs.setdefault(run["equation"], {})
                found.setdefault(run["method"], []).append(float(run["error"]))
    chosen = {name: found for name, found in runs.items() if set(methods) <= set(found)}
    if not chosen:
        raise ValueError(f"no equation in {csv} has runs of all of: {', '.join(methods)}")
    return chosen


def _axes(bands: int, columns: int, height: float, **choices: Any) -> tuple[Any, np.ndarray]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 2.6 * columns + 1, height
    figure, axes = plt.subplots(
        bands, columns, figsize=size, layout="constrained", squeeze=False, **choices
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(axis: Any, name: str, record: dict[str, Any]) -> np.ndarray:
    """Draws the errors' median and range; returns the steps that they are of."""
    errors, steps = np.array(record["errors"]), _steps(record)
    width, color = 2.5 if name == "gdmam" else 1.2, SHOWN[name]
    axis.plot(steps, np.median(errors, 0), color=color, label=name, linewidth=width)
    axis.fill_between(steps, errors.min(0), errors.max(0), color=color, alpha=0.12, linewidth=0)
    return steps


def _steps(record: dict[str, Any]) -> np.ndarray:
    """The steps after which the errors were recorded."""
    count = len(record["errors"][0])
    return record["settings"]["scale"]["steps"] / count * np.arange(1, count + 1)


def _save(figure: Any, path: Path, named: Any = None) -> None:
    """Saves a figure; ``named`` has the curves for the legend."""
    import matplotlib.pyplot as plt

    if named is not None:
        handles, labels = named.get_legend_handles_labels()
        columns = min(6, len(labels), int(figure.get_figwidth() // 1.8))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False,
            fontsize="small",
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
