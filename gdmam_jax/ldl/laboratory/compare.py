"""Several data sets: which method ranks best, and whether that can be told from chance.

Methods are ranked by mean test KLD on every set on which some method beats the trivial
predictions; the others say nothing about methods. Ranks are tested by Friedman's test, pairs of
methods by Nemenyi's, as Demsar recommends.

References:
    Demsar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.
"""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl.laboratory import storage
from gdmam_jax.ldl.laboratory.results import load
from gdmam_jax.ldl.laboratory.tables import badness, compare_runs


@dataclass(frozen=True)
class Comparison:
    """Methods by data sets; methods are ordered by mean rank.

    Attributes:
        sets: names, in alphabetical order.
        methods: names of those that all sets have.
        labels: of the methods.
        klds: mean test KLDs, shape (sets, methods).
        deviations: standard deviations over runs, the same shape.
        trials: the trials that count, the same shape.
        uniform: the best trivial prediction's test KLD by set.
        verdict: the sets on which some method beats it.
        ranks: of every method by set, 1 is best, ties share the mean of theirs.
        p: of the paired t-test over folds against `reference`, shape (sets, methods).
        reference: which method that is.
    """

    sets: list[str]
    methods: list[str]
    labels: list[str]
    klds: NDArray[np.float64]
    deviations: NDArray[np.float64]
    trials: NDArray[np.str_]
    uniform: NDArray[np.float64]
    verdict: NDArray[np.bool_]
    ranks: NDArray[np.float64]
    p: NDArray[np.float64]
    reference: str

    def mean_ranks(self, part: slice = slice(None)) -> NDArray[np.float64]:
        """Mean rank of every method over the sets of the verdict, or every second of them."""
        return np.asarray(self.ranks[self.verdict][part].mean(0))

    def against_reference(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """On how many sets of the verdict a method is better, worse than `reference`, p < 0.05."""
        column = self.methods.index(self.reference)
        difference = self.klds - self.klds[:, [column]]
        clear = (self.p < 0.05) & self.verdict[:, None]
        return (clear & (difference < 0)).sum(0), (clear & (difference > 0)).sum(0)

    def friedman(self) -> float:
        """P of Friedman's test that all methods rank alike."""
        import scipy.stats

        return float(scipy.stats.friedmanchisquare(*self.klds[self.verdict].T).pvalue)


def compare(
    folders: Sequence[str | os.PathLike[str]],
    selected: str,
    tuning: str | None = None,
    *,
    reference: str = "rda",
) -> Comparison:
    """Compare methods over several experiments.

    Args:
        folders: of experiments, one a data set.
        selected: one of `protocol.SELECTIONS`.
        tuning: see `selection.rows`.
        reference: the method that wins and losses are counted against.

    Returns:
        A `Comparison`.

    Raises:
        FileNotFoundError: a folder holds no results.
        ValueError: two folders are of one data set, or no two methods are in all of them, or
            `reference` is not.
    """
    experiments = sorted(map(load, folders), key=lambda experiment: experiment.name.lower())
    names = [experiment.name for experiment in experiments]
    if len(set(names)) < len(names):
        raise ValueError(f"two folders are of one data set: {', '.join(names)}")
    found = [{result.name: result for result in each.methods} for each in experiments]
    common = [name for name in found[0] if all(name in each for each in found)]
    if reference not in common or len(common) < 2:
        raise ValueError(
            f"all folders must have results of {reference} and of another method; all have "
            f"{', '.join(common) or 'none'}"
        )
    values = [[each[name].values("kld", selected, tuning) for name in common] for each in found]
    klds = np.array([[column.mean() for column in row] for row in values])
    verdict = np.array([each.beaten(selected, tuning) for each in experiments])
    ranks = _ranks(klds)
    order = np.argsort((ranks[verdict] if verdict.any() else ranks).mean(0), kind="stable")
    base = common.index(reference)
    return Comparison(
        sets=names,
        methods=[common[i] for i in order],
        labels=[found[0][common[i]].label for i in order],
        klds=klds[:, order],
        deviations=np.array([[row[i].std() for i in order] for row in values]),
        trials=np.array(
            [[each[common[i]].trial(selected, tuning) for i in order] for each in found]
        ),
        uniform=np.array([each.without_features() for each in experiments]),
        verdict=verdict,
        ranks=ranks[:, order],
        p=np.array([[compare_runs(row[i], row[base])[1] for i in order] for row in values]),
        reference=reference,
    )


def _ranks(klds: NDArray[np.float64]) -> NDArray[np.float64]:
    import scipy.stats

    return np.asarray(scipy.stats.rankdata(np.vectorize(badness)(klds), axis=1))


def _shown(kld: float) -> str:
    return f"{kld:.3g}" if kld < 0.1 else f"{kld:.3f}"


def markdown(comparison: Comparison) -> str:
    """A Markdown table: test KLD by method and set, ranks, wins and losses.

    Args:
        comparison: from `compare`.

    Returns:
        Sets that say nothing about methods are in brackets. An asterisk marks what differs from the
        reference with p < 0.05 over folds; the lowest of a set is bold.
    """
    reference = comparison.labels[comparison.methods.index(comparison.reference)]
    heads = [
        name if verdict else f"({name})"
        for name, verdict in zip(comparison.sets, comparison.verdict, strict=True)
    ]
    last = ["mean rank", "odd sets", "even sets", f"better, worse than {reference}"]
    lines = [f"| {' | '.join(['method', *heads, *last])} |"]
    lines.append("| --- |" + " ---: |" * (len(heads) + len(last)))
    parts = slice(None), slice(0, None, 2), slice(1, None, 2)
    means = np.stack([comparison.mean_ranks(part) for part in parts], 1)
    wins, losses = comparison.against_reference()
    for i, label in enumerate(comparison.labels):
        cells = [label]
        for row in range(len(comparison.sets)):
            text = _shown(comparison.klds[row, i])
            text = f"**{text}**" if comparison.ranks[row, i] == 1 else text
            cells.append(text + "\\*" * bool(comparison.p[row, i] < 0.05))
        cells += [f"{mean:.1f}" for mean in means[i]]
        cells.append("" if label == reference else f"{wins[i]}, {losses[i]}")
        lines.append(f"| {' | '.join(cells)} |")
    trivial = map(_shown, comparison.uniform)
    lines.append(f"| {' | '.join(['no features', *trivial, *[''] * len(last)])} |")
    return "\n".join(lines) + "\n"


def write_csv(comparison: Comparison, path: Path) -> None:
    """One line for every set and method: trial, test KLD, rank, p against the reference."""
    head = ["data", "verdict", "method", "trial", "kld", "deviation", "rank"]
    with storage.whole(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
        lines = [[*head, f"p against {comparison.reference}", "kld without features"]]
        for row, name in enumerate(comparison.sets):
            for i, method in enumerate(comparison.methods):
                at = row, i
                trivial = f"{comparison.uniform[row]:.5g}"
                numbers = [f"{a[at]:.5g}" for a in (comparison.klds, comparison.deviations)]
                verdict = str(int(comparison.verdict[row]))
                place = [name, verdict, method, str(comparison.trials[at])]
                tested = [f"{comparison.ranks[at]:g}", f"{comparison.p[at]:.3g}"]
                lines.append([*place, *numbers, *tested, trivial])
        csv.writer(text, lineterminator="\n").writerows(lines)


def draw(comparison: Comparison, path: Path) -> None:
    """The critical-difference diagram: mean ranks, and bars over what Nemenyi's test cannot tell.

    Args:
        comparison: from `compare`, of two sets of the verdict at least.
        path: of the picture.
    """
    import pandas as pd
    import scikit_posthocs
    from matplotlib.figure import Figure

    klds = pd.DataFrame(comparison.klds[comparison.verdict], columns=comparison.labels)
    p = scikit_posthocs.posthoc_nemenyi_friedman(klds)
    ranks = pd.Series(comparison.mean_ranks(), index=comparison.labels)
    figure = Figure(figsize=(9, 1.2 + 0.14 * len(ranks)), layout="constrained", dpi=110)
    axes = figure.subplots()
    scikit_posthocs.critical_difference_diagram(ranks, p, ax=axes)
    axes.set_title(
        f"Mean rank by test KLD, {len(klds)} sets (Friedman p = {comparison.friedman():.1g}; a bar "
        "joins what Nemenyi's test does not tell apart)",
        fontsize=9,
    )
    figure.savefig(path, metadata={"Software": None})
