"""Tables, pictures and one HTML page from an experiment's folder."""

import base64
import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl import storage
from gdmam_jax.ldl.baselines import ATTAINABLE, BASELINES
from gdmam_jax.ldl.experiment import SELECTIONS
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

Record = dict[str, Any]


def load(folder: str | os.PathLike[str]) -> list[Record]:
    """The results in an experiment's folder.

    Args:
        folder: what `experiment.run` wrote to.

    Returns:
        What it returned, ordered by method, and last the trivial baselines' records.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of different data sets or configurations.
    """
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    records = sorted((record for record in records if "runs" in record), key=_place)
    if not records or _trivial(records[0]):
        raise FileNotFoundError(f"no results in {folder}: expected METHOD.json")
    for record in records[1:]:
        for key in ("data", "configuration"):
            if record[key] != records[0][key]:
                raise ValueError(
                    f"{folder} holds results that cannot be compared: the {key} of "
                    f"{records[0]['method']} is {records[0][key]}, that of {record['method']} "
                    f"{record[key]}"
                )
    return records


def _trivial(record: Record) -> bool:
    return record.get("trivial", False)


def _place(record: Record) -> int:
    """Methods before the trivial baselines, and those in their order."""
    return list(BASELINES).index(record["method"]) if _trivial(record) else -1


def _methods(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not _trivial(record)]


def unbeaten(records: Sequence[Record], selection: str) -> str:
    """Says so where no method has a lower test KLD than the best trivial baseline it could know.

    Args:
        records: from `load`.
        selection: see `experiment.SELECTIONS`.

    Returns:
        A sentence, empty where a method beats them, or none of them was tested.
    """
    means = {record["method"]: values(record, selection, "kld").mean() for record in records}
    trivial = {
        record["label"]: means[record["method"]]
        for record in records
        if record["method"] in ATTAINABLE
    }
    if not trivial:
        return ""
    label = min(trivial, key=lambda label: trivial[label])
    if any(means[record["method"]] < trivial[label] for record in _methods(records)):
        return ""
    return (
        f"No method beats a prediction without features ({label}: KLD {trivial[label]:.4f}): "
        "this set says nothing about methods."
    )


def values(record: Record, selection: str, measure: str) -> NDArray[np.float64]:
    """One measure of all runs of a method, shape (seeds, folds), or (1, folds) of a baseline.

    Args:
        record: one of `load`'s.
        selection: see `experiment.SELECTIONS`.
        measure: one of `COLUMNS`.

    Returns:
        float64.
    """
    runs = sorted(record["runs"], key=lambda run: (run["seed"], run["fold"]))
    column = np.array([run["selections"][selection][measure] for run in runs])
    return column.reshape(-1, record["configuration"]["folds"])


@dataclass(frozen=True)
class Cell:
    """One method's outcome in one measure.

    Attributes:
        mean: over folds and seeds.
        deviation: standard deviation over folds and seeds.
        rank: among the methods, 1 is best; NaN for a trivial baseline.
        p_runs: Wilcoxon signed-rank test against the best method, paired over folds and seeds.
            Runs of one fold share their data, so it is the optimistic one of the two.
        p_folds: paired t-test against the best method over folds, each the mean of its seeds.
    """

    mean: float
    deviation: float
    rank: float
    p_runs: float
    p_folds: float


def table(records: Sequence[Record], selection: str) -> dict[str, dict[str, Cell]]:
    """All methods in all measures.

    Args:
        records: from `load`, one a method.
        selection: see `experiment.SELECTIONS`.

    Returns:
        Cells by method's name and measure. The best method's p-values are 1. Trivial baselines are
        compared with it, too.
    """
    cells: dict[str, dict[str, Cell]] = {record["method"]: {} for record in records}
    for measure in COLUMNS:
        columns = {record["method"]: values(record, selection, measure) for record in records}
        sign = -1 if measure in HIGHER_IS_BETTER else 1
        # A method that diverged somewhere has no mean, and is ranked last.
        means = {name: float(column.mean()) for name, column in columns.items()}
        names = [record["method"] for record in _methods(records)]
        order = sorted(names, key=lambda name: _badness(sign * means[name]))
        for name, column in columns.items():
            p_runs, p_folds = compare_runs(column, columns[order[0]])
            cells[name][measure] = Cell(
                mean=means[name],
                deviation=float(column.std()),
                rank=order.index(name) + 1 if name in order else float("nan"),
                p_runs=p_runs,
                p_folds=p_folds,
            )
    return cells


def _badness(mean: float) -> float:
    return float(np.nan_to_num(mean, nan=np.inf))


def compare_runs(left: NDArray[np.float64], right: NDArray[np.float64]) -> tuple[float, float]:
    """Two paired tests of whether two methods differ.

    Args:
        left: shape (seeds, folds).
        right: the same shape, of the same seeds and folds, or (1, folds).

    Returns:
        `(p_runs, p_folds)`, see `Cell`; NaN where a value is not finite.

    >>> import numpy as np
    >>> compare_runs(np.zeros((2, 3)), np.zeros((2, 3)))
    (1.0, 1.0)
    """
    import scipy.stats

    difference = left - right
    if not np.isfinite(difference).all():
        return float("nan"), float("nan")
    if np.ptp(difference) == 0:
        return (1.0, 1.0) if difference.flat[0] == 0 else (0.0, 0.0)
    folds = difference.mean(0)
    same = len(folds) < 2 or np.ptp(folds) == 0
    return (
        float(scipy.stats.wilcoxon(difference.ravel()).pvalue),
        1.0 if same else float(scipy.stats.ttest_1samp(folds, 0).pvalue),
    )


def _cells(
    records: Sequence[Record],
    selection: str,
    mark: Callable[[str, Cell], str],
) -> list[tuple[Record, list[str], float]]:
    """Rows of a table: record, cells as text, mean rank (NaN for trivial baselines, at the end)."""
    cells = table(records, selection)
    rows = []
    for record in records:
        row = cells[record["method"]]
        texts = [mark(f"{cell.mean:.4f} ± {cell.deviation:.4f}", cell) for cell in row.values()]
        rows.append((record, texts, float(np.mean([cell.rank for cell in row.values()]))))
    return sorted(rows, key=lambda row: (_trivial(row[0]), row[2]))


def _settings(record: Record, rank: float) -> tuple[str, str]:
    """Learning rate and mean rank as text, both empty for trivial baselines."""
    return ("", "") if _trivial(record) else (f"{record['learning_rate']:g}", f"{rank:.1f}")


def _arrow(measure: str) -> str:
    return "↑" if measure in HIGHER_IS_BETTER else "↓"


def markdown(records: Sequence[Record], selection: str) -> str:
    """A Markdown table: mean ± standard deviation, mean rank; the best in bold.

    Args:
        records: from `load`.
        selection: see `experiment.SELECTIONS`.

    Returns:
        The table. A dagger marks what differs from the best with p < 0.05 over folds and seeds.
    """

    def mark(text: str, cell: Cell) -> str:
        return f"**{text}**" if cell.rank == 1 else text + " †" * (cell.p_runs < 0.05)

    head = ["method", "learning rate", *(f"{TITLES[m]} {_arrow(m)}" for m in COLUMNS), "mean rank"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for record, texts, rank in _cells(records, selection, mark):
        rate, mean_rank = _settings(record, rank)
        lines.append("| " + " | ".join([record["label"], rate, *texts, mean_rank]) + " |")
    note = unbeaten(records, selection)
    return "\n".join([*lines, *(["", f"**{note}**"] if note else [])]) + "\n"


def latex(records: Sequence[Record], selection: str) -> str:
    """The same as a LaTeX `tabular`, for the package booktabs.

    Args:
        records: from `load`.
        selection: see `experiment.SELECTIONS`.

    Returns:
        The table.
    """

    def mark(text: str, cell: Cell) -> str:
        inner = text.replace("±", r"\pm")
        dagger = r"^\dagger" * (cell.rank != 1 and cell.p_runs < 0.05)
        return rf"$\mathbf{{{inner}}}$" if cell.rank == 1 else f"${inner}{dagger}$"

    arrows = {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
    head = ["Method", *(f"{TITLES[m]} {arrows[_arrow(m)]}" for m in COLUMNS), "Rank"]
    lines = [rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\toprule"]
    lines += [" & ".join(head) + r" \\", r"\midrule"]
    for record, texts, rank in _cells(records, selection, mark):
        lines.append(" & ".join([record["label"], *texts, _settings(record, rank)[1]]) + r" \\")
    note = unbeaten(records, selection)
    if note:
        lines += [r"\midrule", rf"\multicolumn{{{len(head)}}}{{l}}{{{note}}} \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def write_csv(
    records: Sequence[Record], path: Path, *, measures: Sequence[str] = COLUMNS, digits: int = 6
) -> None:
    """Every run and selection as one line: data set, method, fold, seed, selection, measures.

    Args:
        records: from `load`.
        path: of the file.
        measures: which.
        digits: of each.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["data", "method", "fold", "seed", "selection", "epoch", *measures])
        for record in records:
            for run in record["runs"]:
                for selection, found in run["selections"].items():
                    place = [record["data"]["name"], record["method"], run["fold"], run["seed"]]
                    numbers = [f"{found[measure]:.{digits}g}" for measure in measures]
                    writer.writerow([*place, selection, found["epoch"], *numbers])


def summary(folder: str | os.PathLike[str]) -> str:
    """A few lines for the terminal: test KLD by method and selection, learning rates, p-values.

    Args:
        folder: an experiment's.

    Returns:
        Text.
    """
    records = load(folder)
    cells = {selection: table(records, selection) for selection in SELECTIONS}
    width = max(len(record["label"]) for record in records)
    lines = [
        f"test KLD, {records[0]['data']['name']}; in brackets p, paired t-test over folds against "
        "the lowest method's",
        f"{'':<{width}}{'rate':>8}  " + "".join(f"{selection:<25}" for selection in SELECTIONS),
    ]
    for record in records:
        found = [cells[selection][record["method"]]["kld"] for selection in SELECTIONS]
        texts = [
            f"{cell.mean:.4f} ±{cell.deviation:.4f} "
            + f"({cell.p_folds:.1g})".rjust(8) * bool(cell.rank != 1)
            for cell in found
        ]
        rate = _settings(record, 0)[0]
        lines.append(f"{record['label']:<{width}}{rate:>8}  " + "".join(f"{t:<25}" for t in texts))
    notes: dict[str, list[str]] = {}
    for selection in SELECTIONS:
        notes.setdefault(unbeaten(records, selection), []).append(selection)
    lines += [f"{', '.join(where)}: {note}" for note, where in notes.items() if note]
    return "\n".join(line.rstrip() for line in lines)


def compare(folders: Sequence[str | os.PathLike[str]], *, method: str = "gdmam") -> str:
    """Several experiments side by side, and one method against all others.

    Args:
        folders: of experiments, one a data set.
        method: which one the others are compared with.

    Returns:
        Markdown: for every selection a table of test KLDs by method and data set. Behind each in
        brackets `(p_runs, p_folds)`, see `Cell`, of the difference from `method`. Trivial baselines
        are last, and sets on which no method beats them marked. A last table says
        in which epoch each method's validation KLD, mean over all runs, is best, and in which that
        of `method` gets as low; empty where a run diverged.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError: no folder has results of `method`, or one mixes data sets or configurations.
    """
    experiments = [load(folder) for folder in folders]
    found = sorted((record for records in experiments for record in records), key=_place)
    labels = {record["method"]: record["label"] for record in found}
    if method not in labels:
        raise ValueError(f"no results of method {method!r}; there are {', '.join(labels)}")
    parts = [_compared(experiments, labels, selection, method) for selection in SELECTIONS]
    return "\n\n".join([*parts, _epochs(folders, experiments, labels, method)]) + "\n"


def _side_by_side(
    title: str,
    heads: Sequence[str],
    labels: dict[str, str],
    columns: Sequence[dict[str, str]],
) -> str:
    """A Markdown table of one row a method; columns hold cells by method, empty where missing."""
    lines = [title, "", f"| {' | '.join(['method', *heads])} |", "|" + " --- |" * (1 + len(heads))]
    for name, label in labels.items():
        cells = [label, *(column.get(name, "") for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _compared(
    experiments: Sequence[Sequence[Record]], labels: dict[str, str], selection: str, method: str
) -> str:
    columns, heads = [], []
    for records in experiments:
        found = {record["method"]: values(record, selection, "kld") for record in records}
        names = [record["method"] for record in _methods(records)]
        badness = {name: _badness(found[name].mean()) for name in names}
        best = min(badness, key=badness.__getitem__)
        column = {}
        for name, numbers in found.items():
            text = f"{numbers.mean():.4f} ± {numbers.std():.4f}"
            text = f"**{text}**" if name == best else text
            if name != method and method in found:
                text += " ({:.1g}, {:.1g})".format(*compare_runs(numbers, found[method]))
            column[name] = text
        columns.append(column)
        heads.append(records[0]["data"]["name"] + " ‡" * bool(unbeaten(records, selection)))
    title = f"Selection `{selection}`: {SELECTIONS[selection]}"
    text = _side_by_side(title, heads, labels, columns)
    if any(head.endswith("‡") for head in heads):
        text += "\n\n‡ No method beats a prediction without features: says nothing about methods."
    return text


def _epochs(
    folders: Sequence[str | os.PathLike[str]],
    experiments: Sequence[Sequence[Record]],
    labels: dict[str, str],
    method: str,
) -> str:
    columns = []
    for folder, records in zip(folders, experiments, strict=True):
        names = [record["method"] for record in _methods(records)]
        curves = {name: _validation(Path(folder), name) for name in names}
        column = {}
        for name, curve in curves.items():
            best = float(curve.min())
            if method in curves and not np.isnan(best):
                there = np.flatnonzero(curves[method] <= best)
                when = f"{there[0] + 1}" if len(there) else "never"
                column[name] = f"{best:.4f} in {curve.argmin() + 1}; {when}"
        columns.append(column)
    trained = {record["method"] for records in experiments for record in _methods(records)}
    return _side_by_side(
        f"Epoch of the best validation KLD, and the one in which {labels[method]} gets there",
        [records[0]["data"]["name"] for records in experiments],
        {name: label for name, label in labels.items() if name in trained},
        columns,
    )


def _validation(folder: Path, name: str) -> NDArray[np.float64]:
    with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
        return np.asarray(stored["validation_kld"], np.float64).mean(0)


PICTURES = {
    "kld": "KLD over epochs: on the validation rows, on natural rows, and on the test folds",
    "conflict": "Conflict: cosine between the two gradients, and the gate's factors",
    "allocation": "Task weights and momenta over training",
    "head_tail": "Euclidean distance on head and tail labels",
    "distributions": "True and predicted distributions, first test rows",
}
"""The pictures of a report, and their captions."""


def write(folder: str | os.PathLike[str]) -> Path:
    """Write a report into an experiment's folder.

    Args:
        folder: what `experiment.run` wrote to.

    Returns:
        The path of `report.html`. Beside it: `runs.csv`, `table.md`, `table.tex`, and a PNG for
        every one of `PICTURES`.

    Raises:
        FileNotFoundError: there are no results.
    """
    home = Path(folder)
    records = load(home)
    methods = _methods(records)
    curves = {}
    for record in methods:
        with np.load(home / f"{record['method']}.npz", allow_pickle=False) as stored:
            curves[record["method"]] = dict(stored)
    with storage.naming(home):
        write_csv(records, home / "runs.csv")
        for name, text in (("table.md", markdown), ("table.tex", latex)):
            comment = "%" if name.endswith("tex") else ""
            parts = [
                f"{comment} Selection: {SELECTIONS[s]}\n\n{text(records, s)}".lstrip()
                for s in SELECTIONS
            ]
            (home / name).write_text("\n".join(parts), encoding="utf-8")
        pictures = _draw(methods, curves, home)
        page = home / "report.html"
        page.write_text(_page(records, pictures), encoding="utf-8")
    return page


def _page(records: Sequence[Record], pictures: dict[str, Path]) -> str:
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        record=records[0],
        records=_methods(records),
        selections=SELECTIONS,
        titles=[f"{TITLES[m]} {_arrow(m)}" for m in COLUMNS],
        tables={
            s: [
                (r, table(records, s)[r["method"]], _settings(r, rank)[1])
                for r, _, rank in _cells(records, s, lambda text, _: text)
            ]
            for s in SELECTIONS
        },
        notes={s: unbeaten(records, s) for s in SELECTIONS},
        pictures={
            PICTURES[name]: base64.b64encode(path.read_bytes()).decode()
            for name, path in pictures.items()
        },
    )


def _draw(
    records: Sequence[Record], curves: dict[str, dict[str, NDArray[Any]]], home: Path
) -> dict[str, Path]:
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
            "kld": _kld(records, curves),
            "conflict": _diagnostics(
                records,
                curves,
                {
                    "cosine": "cosine",
                    "gate": "gate, parallel",
                    "orthogonal_gate": "gate, orthogonal",
                },
            ),
            "allocation": _diagnostics(
                records,
                curves,
                {
                    "prediction_weight": "weight, prediction",
                    "alignment_weight": "weight, alignment",
                    "prediction_momentum": "momentum, prediction",
                    "parallel_momentum": "momentum, parallel",
                    "orthogonal_momentum": "momentum, orthogonal",
                },
            ),
            "head_tail": _head_tail(records),
            "distributions": _distributions(records, curves),
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


def _kld(records: Sequence[Record], curves: dict[str, dict[str, NDArray[Any]]]) -> Any:
    figure, axes = _figure(1, 3, 13, 4)
    for number, record in enumerate(records):
        found = curves[record["method"]]
        epochs, chunk = record["configuration"]["epochs"], record["configuration"]["chunk"]
        ends = np.minimum(np.arange(chunk, epochs + chunk, chunk), epochs)
        for axis, key, x in (
            (axes[0, 0], "validation_kld", np.arange(1, epochs + 1)),
            (axes[0, 1], "natural_kld", np.arange(1, epochs + 1)),
            (axes[0, 2], "test_kld", ends),
        ):
            axis.plot(x, found[key].mean(0), color=_colour(number), label=record["label"], lw=1.2)
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
    records: Sequence[Record],
    curves: dict[str, dict[str, NDArray[Any]]],
    keys: dict[str, str],
) -> Any:
    chosen = [
        (number, record)
        for number, record in enumerate(records)
        if any(key in curves[record["method"]] for key in keys)
    ]
    if not chosen:
        return None
    rows = -(-len(keys) // 3)
    figure, axes = _figure(rows, 3, 10, 2.8 * rows)
    for axis in axes.ravel()[len(keys) :]:
        axis.set_visible(False)
    for axis, (key, title) in zip(axes.ravel(), keys.items(), strict=False):
        for number, record in chosen:
            column = curves[record["method"]].get(key)
            if column is None:
                continue
            x, mean = np.arange(1, column.shape[1] + 1), column.mean(0)
            axis.plot(x, mean, color=_colour(number), label=record["label"], lw=1.2)
            low, high = np.quantile(column, [0.25, 0.75], axis=0)
            axis.fill_between(x, low, high, color=_colour(number), alpha=0.15, lw=0)
        axis.set(title=title, xlabel="epoch")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _head_tail(records: Sequence[Record]) -> Any:
    figure, axes = _figure(1, 2, 10, 0.8 + 0.32 * len(records), sharey=True)
    labels = [record["label"] for record in records]
    rows = np.arange(len(records))
    for axis, selection in zip(axes[0], ("validation", "last"), strict=True):
        for offset, part, colour in ((-0.19, "head", "C0"), (0.19, "tail", "C1")):
            columns = [values(record, selection, f"euclidean_{part}") for record in records]
            axis.barh(
                rows + offset,
                [column.mean() for column in columns],
                0.36,
                xerr=[column.std() for column in columns],
                color=colour,
                error_kw={"lw": 0.8},
                label=part,
            )
        axis.set(yticks=rows, yticklabels=labels, title=f"selection: {selection}")
        axis.set_xlabel("Euclidean distance, mean ± standard deviation")
        axis.grid(axis="y", visible=False)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure


def _distributions(records: Sequence[Record], curves: dict[str, dict[str, NDArray[Any]]]) -> Any:
    true = curves[records[0]["method"]]["shown_true"][0]
    names = records[0]["data"]["labels"]
    figure, axes = _figure(2, -(-len(true) // 2), 11, 5, sharex=True, sharey=True)
    positions = np.arange(len(names))
    for row, axis in enumerate(axes.ravel()[: len(true)]):
        axis.bar(positions, true[row], color="0.8", label="true")
        for number, record in enumerate(records):
            predicted = curves[record["method"]]["shown_validation"][0][row]
            axis.plot(
                positions,
                predicted,
                "o-",
                color=_colour(number),
                label=record["label"],
                lw=1,
                ms=3,
            )
        axis.set(title=f"test row {row}", xticks=positions, xticklabels=names)
    for axis in axes[-1]:
        axis.set_xlabel("label")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    return figure
