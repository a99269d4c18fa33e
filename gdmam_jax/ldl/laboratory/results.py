"""What lies in an experiment's folder, and what it says once a selection is made."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl.laboratory import baselines, selection, storage
from gdmam_jax.ldl.laboratory.training import Trained


@dataclass(frozen=True)
class Result:
    """The results of one method, or of a trivial prediction.

    Attributes:
      name: of the method.
      label: in tables.
      folds: of the cross-validation.
      trials: by name, all folds of all seeds; empty for a trivial prediction.
      trivial: a trivial prediction's measures on the folds by name; empty for a method.
    """

    name: str
    label: str
    folds: int
    trials: dict[str, Trained] = field(default_factory=dict)
    trivial: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def trial(self, selected: str, tuning: str | None = None) -> str:
        """The trial that counts, see `selection.choose`; empty for a trivial prediction."""
        return selection.choose(self.trials, selected, tuning) if self.trials else ""

    def chosen(self, selected: str, tuning: str | None = None) -> Trained:
        """The same trial's outcome."""
        return self.trials[self.trial(selected, tuning)]

    def values(self, measure: str, selected: str, tuning: str | None = None) -> NDArray[np.float64]:
        """One measure on the test folds, shape (seeds, folds), or (1, folds) if trivial.

        Args:
          measure: one of `tables.COLUMNS`.
          selected: one of `protocol.SELECTIONS`.
          tuning: see `selection.rows`.

        Returns:
          float64.
        """
        if self.trivial:
            return self.trivial[measure][None]
        found = self.chosen(selected, tuning).results[selected]["measures"][measure]
        return np.asarray(found, np.float64).reshape(-1, self.folds)


@dataclass(frozen=True, eq=False)  # told apart by identity, so that tables can be cached
class Experiment:
    """One data set's results.

    Attributes:
      folder: where they lie.
      facts: of `experiment.json`.
      methods: all whose training is finished.
      trivial: the trivial predictions.
      unfinished: names of the methods that are left out, see `left_out`.
    """

    folder: Path
    facts: dict[str, Any]
    methods: list[Result]
    trivial: list[Result]
    unfinished: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the data set."""
        return str(self.facts["data"]["name"])

    @property
    def rows(self) -> list[Result]:
        """Methods, and last the trivial predictions."""
        return [*self.methods, *self.trivial]

    def without_features(self) -> float:
        """Test KLD of the best trivial prediction that a method could know."""
        return min(
            float(result.values("kld", "last").mean())
            for result in self.trivial
            if result.name in baselines.ATTAINABLE
        )

    def beaten(self, selected: str, tuning: str | None = None) -> bool:
        """Whether a method has a lower test KLD than all predictions that need no features."""
        found = [result.values("kld", selected, tuning).mean() for result in self.methods]
        return bool(np.nanmin(found) < self.without_features())


def left_out(unfinished: Sequence[str]) -> str:
    """Says which methods are left out.

    Examples:
      >>> left_out(["rda"])
      'left out, since some of their trials are not finished: rda'
    """
    return f"left out, since some of their trials are not finished: {', '.join(unfinished)}"


def load(folder: str | os.PathLike[str]) -> Experiment:
    """The results in an experiment's folder.

    Args:
      folder: what `experiment.run` wrote to.

    Returns:
      An `Experiment`, with the methods whose trials are all finished.

    Raises:
      FileNotFoundError: there are none.
      ValueError: a file is damaged.
    """
    home = Path(folder)
    path = home / "experiment.json"
    if not path.is_file():
        raise FileNotFoundError(f"no results in {home}: expected experiment.json")
    facts = storage.read_json(path)
    folds, seeds = facts["configuration"]["folds"], facts["configuration"]["seeds"]
    methods, unfinished = [], []
    for described in sorted(home.glob("*/method.json")):
        record = storage.read_json(described)
        files = {
            trial: storage.outcomes(described.parent / trial, seeds) for trial in record["trials"]
        }
        if all(file.is_file() for group in files.values() for file in group):
            trials = {trial: _joined(group) for trial, group in files.items()}
            methods.append(Result(record["method"], record["label"], folds, trials))
        else:
            unfinished.append(record["method"])
    if not methods:
        named = f"; {left_out(unfinished)}" if unfinished else ""
        raise FileNotFoundError(f"no results in {home}: no method is finished{named}")
    trivial = [
        Result(
            name,
            baselines.BASELINES[name],
            folds,
            trivial={m: np.array(v) for m, v in found.items()},
        )
        for name, found in facts["trivial"].items()
    ]
    return Experiment(home, facts, methods, trivial, unfinished)


def _joined(files: Sequence[Path]) -> Trained:
    """All seeds of a trial."""
    found = map(storage.read_npz, files)
    return Trained(**jax.tree.map(lambda *leaves: np.concatenate(leaves), *found))
