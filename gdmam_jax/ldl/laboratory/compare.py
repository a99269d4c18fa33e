"""Several data sets: which method ranks best, and whether that can be told from chance.

Methods are ranked by mean test KLD on every set on which some method beats the trivial
predictions. These are the sets of the verdict; the others say nothing about methods. Ranks are
tested by Friedman's test, pairs of methods by Nemenyi's, as Demsar recommends.

References:
  Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gdmam_jax.ldl.laboratory import methods, storage
from gdmam_jax.ldl.laboratory.results import left_out, load
from gdmam_jax.ldl.laboratory.tables import compare_runs

if TYPE_CHECKING:
    import pandas as pd

PARTS = {"mean rank": (0, 1), "odd sets": (0, 2), "even sets": (1, 2)}
"""The sets of the verdict over which mean ranks are shown: number of the first, and step."""


def compare(
    folders: Sequence[str | os.PathLike[str]],
    selected: str,
    tuning: str | None = None,
    *,
    reference: str = "rda",
) -> "pd.DataFrame":
    """Compare methods over several experiments.

    Args:
      folders: of experiments, one for each data set.
      selected: one of `protocol.SELECTIONS`.
      tuning: see `selection.rows`.
      reference: the method against which all are tested.

    Returns:
      A row for every set, in alphabetical order, and method, lowest mean rank first: ``data``;
      ``method``; ``verdict``, whether some method beats the trivial predictions; ``label``;
      ``trial``, the one that counts; ``kld``, its mean test KLD, and ``deviation`` over runs;
      ``rank`` on the set, where ties share the mean of theirs; ``p against REFERENCE``, over
      folds, see `tables.compare_runs`; ``kld without features``, the best trivial prediction's.

    Raises:
      FileNotFoundError: a folder holds no results.
      ValueError: two folders are of one data set, or no two methods are in all of them, or
        `reference` is not, or is unknown.
    """
    import pandas as pd

    experiments = sorted(map(load, folders), key=lambda experiment: experiment.name.lower())
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise ValueError(f"two folders are of one data set: {', '.join(names)}")
    found = [{result.name: result for result in each.methods} for each in experiments]
    common = [name for name in found[0] if all(name in each for each in found)]
    if not any(reference in each for each in found):
        methods.find(reference)  # refuses unknown names
    if reference not in common or len(common) < 2:
        unfinished = sorted({name for each in experiments for name in each.unfinished})
        raise ValueError(
            f"all folders must have results of {reference} and of another method; all have "
            f"{', '.join(common) or 'none'}" + (f"; {left_out(unfinished)}" if unfinished else "")
        )
    rows = []
    for each, results in zip(experiments, found, strict=True):
        base = results[reference].values("kld", selected, tuning)
        for name in common:
            values = results[name].values("kld", selected, tuning)
            rows.append(
                {
                    "data": each.name,
                    "method": name,
                    "verdict": int(each.beaten(selected, tuning)),
                    "label": results[name].label,
                    "trial": results[name].trial(selected, tuning),
                    "kld": values.mean(),
                    "deviation": values.std(),
                    f"p against {reference}": compare_runs(values, base)[1],
                    "kld without features": each.without_features(),
                }
            )
    table = pd.DataFrame(rows)
    table.insert(6, "rank", table["kld"].fillna(np.inf).groupby(table["data"]).rank())
    ranked = judged(table) if table["verdict"].any() else table
    means = ranked.groupby("method", sort=False)["rank"].mean().sort_values(kind="stable")
    order = [(name, method) for name in names for method in means.index]
    return table.set_index(["data", "method"]).loc[order].reset_index()


def judged(table: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of the sets of the verdict."""
    return table[table["verdict"] == 1]


def _klds(table: "pd.DataFrame") -> "pd.DataFrame":
    """Test KLDs of the sets of the verdict, by set and label; infinite where training diverged."""
    return judged(table).pivot(index="data", columns="label", values="kld").fillna(np.inf)


def friedman(table: "pd.DataFrame") -> float:
    """P of Friedman's test that all methods rank alike on the sets of the verdict."""
    import scipy.stats

    return float(scipy.stats.friedmanchisquare(*_klds(table).to_numpy().T).pvalue)


def _shown(kld: float) -> str:
    return f"{kld:.3g}" if kld < 0.1 else f"{kld:.3f}"


def markdown(table: "pd.DataFrame") -> str:
    """A Markdown table: test KLD by method and set, ranks, wins and losses.

    Args:
      table: from `compare`.

    Returns:
      Sets that say nothing about methods are in brackets. An asterisk marks what differs from the
      reference with p < 0.05 over folds; the lowest of a set is bold.
    """
    tested = next(name for name in table if name.startswith("p against "))
    reference = table[table["method"] == tested.removeprefix("p against ")].set_index("data")
    heads = [name if verdict else f"({name})" for name, verdict in reference["verdict"].items()]
    label = reference["label"].iloc[0]
    last = [*PARTS, f"better, worse than {label}"]
    lines = [f"| {' | '.join(['method', *heads, *last])} |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + len(last)))
    table = table.assign(best=table["kld"] == table.groupby("data")["kld"].transform("min"))
    for method, rows in table.groupby("method", sort=False):
        cells = [rows["label"].iloc[0]]
        for kld, best, p in rows[["kld", "best", tested]].to_numpy().tolist():
            bold = "**" * best
            cells.append(bold + _shown(kld) + bold + "\\*" * (p < 0.05))
        counted = judged(rows)
        for first, step in PARTS.values():
            cells.append(f"{counted['rank'].iloc[first::step].mean():.1f}")
        clear = counted[counted[tested] < 0.05]
        better = int((clear["kld"] < clear["data"].map(reference["kld"])).sum())
        same = method == reference["method"].iloc[0]
        cells.append("" if same else f"{better}, {len(clear) - better}")
        lines.append(f"| {' | '.join(cells)} |")
    trivial = map(_shown, reference["kld without features"])
    lines.append(f"| {' | '.join(['no features', *trivial, *[''] * len(last)])} |")
    return "\n".join(lines) + "\n"


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """Write what `compare` found, five digits of every number."""
    with storage.whole(path) as file:
        table.to_csv(file, index=False, float_format="%.5g", lineterminator="\n")


def draw(table: "pd.DataFrame", path: Path) -> None:
    """The critical-difference diagram: mean ranks, and bars over what Nemenyi's test cannot tell.

    Args:
      table: from `compare`, of two sets of the verdict and three methods at least.
      path: of the picture.
    """
    import scikit_posthocs
    from matplotlib.figure import Figure

    klds = _klds(table)
    p = scikit_posthocs.posthoc_nemenyi_friedman(klds)
    ranks = judged(table).groupby("label")["rank"].mean()
    figure = Figure(figsize=(9, 1.2 + 0.14 * len(ranks)), layout="constrained", dpi=110)
    axes = figure.subplots()
    scikit_posthocs.critical_difference_diagram(ranks, p, ax=axes)
    axes.set_title(
        f"Mean rank by test KLD, {len(klds)} sets (Friedman p = {friedman(table):.1g}; a bar "
        "joins what Nemenyi's test does not tell apart)",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Software": None})
