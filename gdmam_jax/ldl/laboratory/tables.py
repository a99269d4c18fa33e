"""Tables of an experiment: means, ranks, significance; as Markdown, LaTeX, CSV and plain text."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl.laboratory import storage
from gdmam_jax.ldl.laboratory.protocol import SELECTIONS
from gdmam_jax.ldl.laboratory.results import Experiment, Result, left_out
from gdmam_jax.ldl.measures import HIGHER_IS_BETTER, MEASURES

COLUMNS = (*MEASURES, "euclidean", "euclidean_head", "euclidean_tail")
"""The measures in a table's order."""

TITLES = {
    "chebyshev": "Chebyshev",
    "clark": "Clark",
    "canberra": "Canberra",
    "kld": "KLD",
    "cosine": "Cosine",
    "intersection": "Intersection",
    "euclidean": "Euclidean",
    "euclidean_head": "Euclidean, head",
    "euclidean_tail": "Euclidean, tail",
}


@dataclass(frozen=True)
class Cell:
    """One method's outcome in one measure.

    Attributes:
      mean: over folds and seeds.
      deviation: standard deviation over folds and seeds.
      rank: among the methods, 1 is best, and ties share the mean of theirs; NaN for a trivial
        baseline.
      best: whether no method is better; False for a trivial baseline, and for NaN.
      p_runs: Wilcoxon signed-rank test against the best method, paired over folds and seeds.
        Runs of one fold share their data and training folds overlap, so it is the optimistic one
        of the two.
      p_folds: corrected resampled t-test against the best method over folds, see `compare_runs`.
    """

    mean: float
    deviation: float
    rank: float
    best: bool
    p_runs: float
    p_folds: float


@functools.lru_cache(maxsize=16)  # text, page and summary show the same tables
def table(
    experiment: Experiment, selected: str, tuning: str | None = None
) -> dict[str, dict[str, Cell]]:
    """All methods in all measures.

    Args:
      experiment: from `results.load`.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      Cells by method's name and measure. The best method's p-values are 1. Trivial baselines are
      compared with it, too.
    """
    import scipy.stats

    cells: dict[str, dict[str, Cell]] = {result.name: {} for result in experiment.rows}
    for measure in COLUMNS:
        columns = {
            result.name: result.values(measure, selected, tuning) for result in experiment.rows
        }
        sign = -1 if measure in HIGHER_IS_BETTER else 1
        # A method that diverged somewhere has no mean, and is ranked last.
        means = {name: float(column.mean()) for name, column in columns.items()}
        names = [result.name for result in experiment.methods]
        scores = [np.nan_to_num(sign * means[name], nan=np.inf) for name in names]
        ranks = dict(zip(names, map(float, scipy.stats.rankdata(scores)), strict=True))
        best = names[int(np.argmin(scores))]
        for name, column in columns.items():
            p_runs, p_folds = compare_runs(column, columns[best])
            cells[name][measure] = Cell(
                mean=means[name],
                deviation=float(column.std()),
                rank=ranks.get(name, float("nan")),
                best=name in ranks and means[name] == means[best],
                p_runs=p_runs,
                p_folds=p_folds,
            )
    return cells


def compare_runs(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, float]:
    r"""Two paired tests of whether two methods differ.

    The test over folds is the corrected resampled t-test. With the difference's mean $\bar d$ and
    standard deviation $s$ over n folds, each the mean of its seeds, and n - 1 degrees of freedom,

    $$t = \bar d \Big/ \Big(s \sqrt{\tfrac1n + \tfrac1{n - 1}}\Big)$$

    The term $1 / (n - 1)$, the split's test over training rows, allows for training folds that
    overlap.
    Seeds repeat the same folds: they make each fold's difference more exact, but n no larger.

    Args:
      left: shape (seeds, folds).
      right: the same shape, of the same seeds and folds, or (1, folds).

    Returns:
      `(p_runs, p_folds)`, see `Cell`; NaN where a value is not finite.

    Examples:
      >>> import numpy as np
      >>> compare_runs(np.zeros((2, 3)), np.zeros((2, 3)))
      (1.0, 1.0)

    References:
      Nadeau and Bengio, Inference for the Generalization Error, Machine Learning 2003.
    """
    import scipy.stats

    difference = left - right
    if not np.isfinite(difference).all():
        return float("nan"), float("nan")
    if not difference.any():
        return 1.0, 1.0
    folds = difference.mean(0)
    p_runs = float(scipy.stats.wilcoxon(difference.ravel()).pvalue)
    if len(folds) < 2:
        return p_runs, 1.0
    if np.ptp(folds) == 0:
        return p_runs, float(folds[0] == 0)
    n = len(folds)
    t = folds.mean() / (folds.std(ddof=1) * np.sqrt(1 / n + 1 / (n - 1)))
    return p_runs, float(2 * scipy.stats.t.sf(abs(t), n - 1))


def unbeaten(experiment: Experiment, selected: str, tuning: str | None = None) -> str:
    """Says so if no method has a lower test KLD than the best trivial baseline it could know.

    Args:
      experiment: from `results.load`.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      A sentence; empty if a method beats that baseline.
    """
    if experiment.beaten(selected, tuning):
        return ""
    return "No method beats a prediction without features: this set says nothing about methods."


def ranked(
    experiment: Experiment,
    selected: str,
    tuning: str | None,
    mark: Callable[[str, Cell], str] = lambda text, _: text,
) -> list[tuple[Result, list[str], str]]:
    """Rows of a table: result, cells as text, mean rank; trivial predictions at the end."""
    cells = table(experiment, selected, tuning)
    rows = []
    for result in experiment.rows:
        row = cells[result.name].values()
        texts = [mark(f"{cell.mean:.4f} ± {cell.deviation:.4f}", cell) for cell in row]
        rank = float(np.mean([cell.rank for cell in row]))
        rows.append((bool(result.trivial), rank, result, texts))
    return [
        (result, texts, "" if trivial else f"{rank:.1f}")
        for trivial, rank, result, texts in sorted(rows, key=lambda row: row[:2])
    ]


def arrow(measure: str) -> str:
    """Which way is better."""
    return "↑" if measure in HIGHER_IS_BETTER else "↓"


def markdown(experiment: Experiment, selected: str, tuning: str | None = None) -> str:
    """A Markdown table: mean ± standard deviation, mean rank; the best in bold.

    Args:
      experiment: from `results.load`.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      The table. A dagger marks what differs from the best with p < 0.05 over folds and seeds.
    """

    def mark(text: str, cell: Cell) -> str:
        return f"**{text}**" if cell.best else text + " †" * (cell.p_runs < 0.05)

    head = ["method", "trial", *(f"{TITLES[m]} {arrow(m)}" for m in COLUMNS), "mean rank"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for result, texts, rank in ranked(experiment, selected, tuning, mark):
        cells = [result.label, result.trial(selected, tuning), *texts, rank]
        lines.append("| " + " | ".join(cells) + " |")
    note = unbeaten(experiment, selected, tuning)
    return "\n".join([*lines, *(["", f"**{note}**"] if note else [])]) + "\n"


def latex(experiment: Experiment, selected: str, tuning: str | None = None) -> str:
    """The same as a LaTeX `tabular`, for the package booktabs.

    Args:
      experiment: from `results.load`.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      The table.
    """

    def mark(text: str, cell: Cell) -> str:
        inner = text.replace("±", r"\pm")
        dagger = r"^\dagger" * (not cell.best and cell.p_runs < 0.05)
        return rf"$\mathbf{{{inner}}}$" if cell.best else f"${inner}{dagger}$"

    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    head = ["Method", *(f"{TITLES[m]} {arrows[arrow(m)]}" for m in COLUMNS), "Rank"]
    lines = [rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(head) + r" \\", r"\midrule"]
    for result, texts, rank in ranked(experiment, selected, tuning, mark):
        label = re.sub(r"([&%$#_{}])", r"\\\1", result.label)
        lines.append(" & ".join([label, *texts, rank]) + r" \\")
    note = unbeaten(experiment, selected, tuning)
    if note:
        lines += [r"\midrule", rf"\multicolumn{{{len(head)}}}{{l}}{{{note}}} \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write_csv(
    experiment: Experiment, path: Path, selections: Sequence[str], tuning: str | None = None
) -> None:
    """Every run of the trials that count as one line.

    Args:
      experiment: from `results.load`.
      path: of the file.
      selections: some of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.
    """
    import pandas as pd

    parts = []
    for selected in selections:
        for result in experiment.rows:
            columns = {m: result.values(m, selected, tuning) for m in COLUMNS}
            seeds, folds = np.indices(columns["kld"].shape).reshape(2, -1)
            trial = result.trial(selected, tuning)
            parts.append(
                pd.DataFrame(
                    {
                        "data": experiment.name,
                        "selection": selected,
                        "method": result.name,
                        "trial": trial,
                        "fold": folds,
                        "seed": seeds,
                        "epoch": result.trials[trial].results[selected]["epoch"] if trial else "",
                        **{measure: values.ravel() for measure, values in columns.items()},
                    }
                )
            )
    with storage.whole(path) as file:
        pd.concat(parts).to_csv(file, index=False, float_format="%.6g", lineterminator="\n")


def summary(experiment: Experiment, selections: Sequence[str], tuning: str | None = None) -> str:
    """A few lines for the terminal: test KLD by method and selection, trials, p-values.

    Args:
      experiment: from `results.load`.
      selections: some of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.

    Returns:
      Text.
    """
    width = max(len(result.label) for result in experiment.rows)
    lines = [
        f"test KLD, {experiment.name}; in brackets: p of a t-test over folds, which allows for "
        "their overlap, against the method with the lowest KLD, and the learning rate (and "
        "setting) chosen"
    ]
    for selected in selections:
        cells = table(experiment, selected, tuning)
        lines.append(f"{selected}: {SELECTIONS[selected]}")
        for result in experiment.rows:
            cell = cells[result.name]["kld"]
            text = f"  {result.label:<{width}}  {cell.mean:.4f} ±{cell.deviation:.4f}"
            p = "lowest" if cell.best else f"{cell.p_folds:.1g}"
            notes = filter(None, [p, result.trial(selected, tuning)])
            lines.append(f"{text}  ({', '.join(notes)})")
        note = unbeaten(experiment, selected, tuning)
        lines += [f"  {note}"] if note else []
    if experiment.unfinished:
        lines.append(left_out(experiment.unfinished))
    return "\n".join(lines)
