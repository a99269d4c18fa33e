"""Experiments: every method trained with every learning rate and setting, kept in a folder.

    FOLDER/experiment.json              data, configuration, versions, trivial predictions
    FOLDER/METHOD/method.json           its label, and the trials it was asked for
    FOLDER/METHOD/TRIAL/SEED.npz        a `training.Trained` of all folds

A *trial* is a learning rate and, where a method has several, a setting.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gdmam_jax.ldl.data import Dataset, Folds, make_folds
from gdmam_jax.ldl.imbalance import imbalance_statistics
from gdmam_jax.ldl.laboratory import baselines, storage
from gdmam_jax.ldl.laboratory.methods import Method
from gdmam_jax.ldl.laboratory.program import SHOWN, Program, build
from gdmam_jax.ldl.laboratory.protocol import Configuration
from gdmam_jax.ldl.laboratory.training import train

Progress = Callable[[str, int, int], None]
"""Told `(method's label, epochs done, epochs in all)` at the start and after every chunk."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A learning rate and a setting of a method.

    Attributes:
      name: of its folder.
      learning_rate: of its runs.
      setting: number of the setting.
    """

    name: str
    learning_rate: float
    setting: float


def trials(method: Method, configuration: Configuration) -> list[Trial]:
    """What a method is trained with.

    A rate's name has six digits, or nine if six do not tell it from another rate in float32, in
    which programs have it. Rates that are the same in float32 are one.

    Examples:
      >>> from gdmam_jax.ldl.laboratory import methods
      >>> configuration = Configuration(learning_rates=(1e-3, 3e-3))
      >>> [trial.name for trial in trials(methods.find("gdmam"), configuration)]
      ['0.001', '0.003']
    """
    settings = method.settings or {"": 0.0}
    return [
        Trial(rate + f"-{name}" * (len(settings) > 1), float(rate), setting)
        for rate in dict.fromkeys(map(_rate_name, configuration.learning_rates))
        for name, setting in settings.items()
    ]


def _rate_name(rate: float) -> str:
    short, exact = f"{rate:g}", np.float32(rate)
    return short if np.float32(short) == exact else f"{exact:.9g}"


def work(method: Method, configuration: Configuration) -> int:
    """Epochs that a method trains for in all.

    Examples:
      >>> from gdmam_jax.ldl.laboratory import methods
      >>> work(methods.find("rda"), Configuration(epochs=300, seeds=5))
      1500
    """
    return len(trials(method, configuration)) * configuration.seeds * configuration.epochs


def run(
    dataset: Dataset,
    methods: Sequence[Method],
    configuration: Configuration,
    *,
    folder: str | os.PathLike[str],
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> None:
    """Train every method on a data set's folds, with every learning rate and setting.

    The rate, setting and epoch that count are chosen when results are read, see `results.load`.
    Folds are trained in threads, see `training.train`.

    Args:
      dataset: a `Dataset`.
      methods: which, see `methods.METHODS`.
      configuration: what they have in common.
      folder: for results and checkpoints. What is there is not trained again, so that learning
        rates and methods can be added. A training that broke off goes on at its last checkpoint,
        with the same numbers. A method is known by its name: one whose optimizer or losses you
        have changed needs another name, or another folder.
      checkpoint_seconds: see `training.train`.
      progress: see `Progress`.

    Raises:
      ValueError: the folder holds results of another configuration or data set.
      OSError: the folder cannot be written, or another run writes to it.

    Warns:
      UserWarning: the training folds are not made imbalanced, or the folder holds results that were
        made with other versions.
    """
    folds = make_folds(
        dataset, folds=configuration.folds, validation_size=configuration.validation_size
    )
    if np.array_equal(folds.natural, folds.validation):
        warnings.warn(
            f"{dataset.name} is not made imbalanced: training folds keep all rows, or nearly all, "
            "and natural rows are the validation rows; give it a sampler",
            stacklevel=2,
        )
    home = Path(folder)
    with storage.locked(home):
        _check(home, facts(dataset, folds, configuration), folds)
        built: dict[Any, Program] = {}
        for method in methods:
            (home / method.name).mkdir(exist_ok=True)
            _describe(home / method.name / "method.json", method, configuration)
            if progress:
                done = _finished(method, configuration, home)
                progress(method.label, done, work(method, configuration))
        for method in methods:
            _run_method(method, folds, configuration, home, built, checkpoint_seconds, progress)


def _run_method(
    method: Method,
    folds: Folds,
    configuration: Configuration,
    home: Path,
    built: dict[Any, Program],
    checkpoint_seconds: float,
    progress: Progress | None,
) -> None:
    done, total = _finished(method, configuration, home), work(method, configuration)
    for trial, seed, outcome in _jobs(method, configuration, home):
        checkpoints = outcome.with_suffix("")
        if outcome.is_file():
            shutil.rmtree(checkpoints, ignore_errors=True)  # if a run was killed before it could
            continue
        if method.program() not in built:  # methods that differ by a setting share it
            built[method.program()] = build(method, folds, configuration)
        checkpoints.mkdir(parents=True, exist_ok=True)
        trained = train(
            built[method.program()],
            seed,
            trial.learning_rate,
            configuration,
            setting=trial.setting,
            folder=checkpoints,
            checkpoint_seconds=checkpoint_seconds,
            progress=progress and partial(_told, progress, method.label, done, total),
        )
        storage.write_npz(outcome, trained._asdict())
        shutil.rmtree(checkpoints, ignore_errors=True)
        done += configuration.epochs


def _jobs(
    method: Method, configuration: Configuration, home: Path
) -> list[tuple[Trial, int, Path]]:
    """Trials and seeds, and the file where the outcome of each is to lie."""
    return [
        (trial, seed, outcome)
        for trial in trials(method, configuration)
        for seed, outcome in enumerate(
            storage.outcomes(home / method.name / trial.name, configuration.seeds)
        )
    ]


def _finished(method: Method, configuration: Configuration, home: Path) -> int:
    """Epochs whose outcomes lie in the folder."""
    there = [path.is_file() for *_, path in _jobs(method, configuration, home)]
    return sum(there) * configuration.epochs


def _describe(path: Path, method: Method, configuration: Configuration) -> None:
    """Write the label, and the trials along with those that earlier runs have finished."""
    found = storage.read_json(path)["trials"] if path.is_file() else []
    finished = [
        name
        for name in found
        if all(file.is_file() for file in storage.outcomes(path.parent / name, configuration.seeds))
    ]
    names = dict.fromkeys([*finished, *(trial.name for trial in trials(method, configuration))])
    record = {"method": method.name, "label": method.label, "trials": list(names)}
    storage.write_json(path, record)


def _told(progress: Progress, label: str, before: int, total: int, epoch: int) -> None:
    progress(label, before + epoch, total)


def facts(dataset: Dataset, folds: Folds, configuration: Configuration) -> dict[str, Any]:
    """What all methods of an experiment have in common, but for the learning rates."""
    training = [rows[mask] for rows, mask in zip(folds.train, folds.train_mask, strict=True)]
    factors = [imbalance_statistics(folds.labels[rows]).factor for rows in training]
    common = {
        "data": {
            "name": dataset.name,
            "samples": len(dataset.features),
            "features": dataset.features.shape[1],
            "labels": list(dataset.label_names),
            "training_rows": [len(rows) for rows in training],
            "imbalance_factor": float(np.mean(factors)),
            "checksum": _checksum(folds),
        },
        "configuration": dataclasses.asdict(configuration),
    }
    del common["configuration"]["learning_rates"]
    return json.loads(json.dumps(common))  # tuples become the lists that are read from a file


def _checksum(folds: Folds) -> str:
    """A hash of every number of the data that a run sees, and of the rows of each fold."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(folds):
        digest.update(np.ascontiguousarray(getattr(folds, field.name)).tobytes())
    return digest.hexdigest()


def _check(home: Path, common: dict[str, Any], folds: Folds) -> None:
    """Write what all methods have in common, or compare it with what is there."""
    path = home / "experiment.json"
    if path.is_file():
        found = storage.read_json(path)
        for key in ("configuration", "data"):
            changed = [
                f"{name} = {found[key].get(name)}, now {value}"
                for name, value in common[key].items()
                if found[key].get(name) != value
            ]
            if changed:
                raise ValueError(
                    f"{path} is of another {key}: {'; '.join(changed)}; give another folder, or "
                    "remove it"
                )
        before = found["versions"]
        other = [f"{name} {now}" for name, now in versions().items() if before.get(name) != now]
        if other:
            warnings.warn(
                f"{path} was made with other versions than {', '.join(other)}: what is trained now "
                "is compared with older results",
                stacklevel=3,
            )
        return
    trivial = {
        name: {measure: values.tolist() for measure, values in measures.items()}
        for name, measures in baselines.score(folds).items()
    }
    shown = folds.labels[folds.test[:, :SHOWN]].tolist()
    storage.write_json(
        path, common | {"versions": versions(), "trivial": trivial, "shown_true": shown}
    )


def versions() -> dict[str, str]:
    """The versions a result was made with: Python, the package's and those it rests on.

    Examples:
      >>> sorted(versions())
      ['flax', 'gdmam-jax', 'jax', 'numpy', 'optax', 'python']
    """
    found = {"python": platform.python_version()}
    for name in ("gdmam-jax", "jax", "flax", "optax", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from the source folder
            found[name] = "source"
    return found
