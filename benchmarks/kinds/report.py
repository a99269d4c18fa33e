"""What the runs say: the rate and factor that were chosen, and the results with them."""

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.kinds.kind import Kind
from benchmarks.kinds.methods import PROGRAMS, TUNED


class Row(NamedTuple):
    """One run: a line of the file."""

    kind: str
    title: str
    measure: str
    better: str
    method: str
    of: str
    rate: float
    seed: int
    score: float
    cosine: float
    ratio: float


class Found(NamedTuple):
    """A method at the rate that was chosen: how good it is on the tuning seeds, and the results."""

    method: str
    rate: float
    tuning: float
    scores: np.ndarray
    cosines: np.ndarray
    ratios: np.ndarray


def rows(kinds: dict[str, Kind], folder: Path) -> list[Row]:
    """Every run of the results, by kind and method; a tuned method's are those of its best."""
    written = []
    for name, kind in kinds.items():
        found = _chosen(name, kind.higher, folder)
        for tuned, names in TUNED.items():
            candidates = [found[each] for each in names if each in found]
            if candidates:
                found[tuned] = min(candidates, key=lambda each: each.tuning)
        for method, each in found.items():
            runs = zip(each.scores, each.cosines, each.ratios, strict=True)
            better = "higher" if kind.higher else "lower"
            about = name, kind.title, kind.measure, better, method, each.method, each.rate
            written += [Row(*about, seed, *run) for seed, run in enumerate(runs)]
    return written


def _chosen(name: str, higher: bool, folder: Path) -> dict[str, Found]:
    """Each method at the rate that is best on its tuning seeds."""
    found = {}
    for program in PROGRAMS:
        path = folder / f"{name}-{program}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        seeds = record["settings"]["seeds"]
        sign = -1 if higher else 1
        # NaN is the worst of all.
        tuning = sign * np.array(record["chosen_by"], float)[:, :, seeds:]
        costs = np.nan_to_num(tuning, nan=np.inf).mean(axis=2)
        best = np.argmin(costs, axis=1)
        for number, method in enumerate(record["methods"]):
            at = number, best[number]
            runs = {k: np.array(record[k], float)[at][:seeds] for k in ("score", "cosine", "ratio")}
            runs["score"] = np.nan_to_num(runs["score"], nan=sign * np.inf)
            found[method] = Found(method, record["rates"][best[number]], costs[at], *runs.values())
    return found


def table(rows: list[Row]) -> str:
    """Markdown: the median (range) of the scores, by kind and method; the best median bold."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lines = [f"| kind | {' | '.join(methods)} |", "| --- |" + " ---: |" * len(methods)]
    for kind in dict.fromkeys(row.kind for row in rows):
        runs = {m: [r for r in rows if (r.kind, r.method) == (kind, m)] for m in methods}
        higher = next(row for row in rows if row.kind == kind).better == "higher"
        medians = {m: np.median([r.score for r in each]) for m, each in runs.items() if each}
        best = (max if higher else min)(medians.values())
        cells: list[Any] = []
        for method, each in runs.items():
            if not each:
                cells.append("")
                continue
            scores = [row.score for row in each]
            text = f"{medians[method]:.4g} ({min(scores):.4g} to {max(scores):.4g})"
            cells.append(f"**{text}**" if medians[method] == best else text)
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_csv(rows: list[Row], path: Path) -> None:
    """One line for each run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
