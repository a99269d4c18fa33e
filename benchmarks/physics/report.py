"""What the runs say: a table, curves, and a file with every error."""

import json
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
    """The final error of each seed; infinite where it is no number."""
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


def write_csv(records: Records, path: Path) -> None:
    """One line a run: equation, method, rate, seed, final error."""
    lines = ["equation,method,rate,seed,error"]
    for equation, found in records.items():
        for name, record in found.items():
            for seed, error in enumerate(finals(record)):
                lines.append(f"{equation},{name},{record['rate']:g},{seed},{error:.6g}")
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


def draw(records: Records, path: Path) -> None:
    """Errors over the steps by equation, median and range over the seeds; cosines below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(5, len(records))
    bands = -(-len(records) // columns)
    figure, axes = plt.subplots(
        2 * bands, columns, figsize=(2.6 * columns + 1, 5 * bands), layout="constrained",
        squeeze=False, height_ratios=(2, 1) * bands, sharex=True,
    )  # fmt: skip
    for unused in axes[-2:, (len(records) - 1) % columns + 1 :].flat:
        unused.set_visible(False)
    for number, (equation, found) in enumerate(records.items()):
        band, column = divmod(number, columns)
        upper, lower = axes[2 * band : 2 * band + 2, column]
        for name, color in SHOWN.items():
            if name not in found:
                continue
            record = found[name]
            errors = np.array(record["errors"])
            every = record["settings"]["scale"]["steps"] / errors.shape[1]
            steps = every * np.arange(1, errors.shape[1] + 1)
            width = 2.5 if name == "gdmam" else 1.2
            upper.plot(steps, np.median(errors, 0), color=color, label=name, linewidth=width)
            upper.fill_between(
                steps, errors.min(0), errors.max(0), color=color, alpha=0.12, linewidth=0
            )
            if name in ("summed", "gdmam"):
                lower.plot(steps, np.median(record["cosines"], 0), color=color)
        upper.set(title=equation, yscale="log")
        lower.axhline(0, color="grey", linewidth=0.5)
        lower.set(xlabel="step", ylim=(-1, 1))
    for upper, lower in zip(axes[::2, 0], axes[1::2, 0], strict=True):
        upper.set_ylabel("relative error")
        lower.set_ylabel("cosine of the gradients")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
