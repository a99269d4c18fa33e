"""Every weighting on three kinds of problems, in front of Adam.

Differential equations (the relative error of the learned solution), label distributions (the test
KLD) and two overlaid digits read with one trunk (the share of digits read right). Each weighting
has the rate that is best on seeds or rows that are not reported.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks import timing
from benchmarks.absent import WEIGHTINGS
from benchmarks.defaults import RATES, distributions
from benchmarks.kinds import images
from benchmarks.kinds.training import train as train_kind
from benchmarks.options import already_run
from benchmarks.physics.equations import EQUATIONS
from benchmarks.physics.training import SMALL
from benchmarks.physics.training import train as train_network
from gdmam_jax.ldl.laboratory import storage
from gdmam_jax.ldl.laboratory.methods import Method

GATED: dict[str, tuple[Any, gdmam.Gate]] = {
    "unit + priority gate": (gdmam.unit_weighting, gdmam.priority_gate)
} | {name: (weighting, gdmam.open_gate) for name, weighting in WEIGHTINGS.items()}
"""The default's choice, and every weighting with the gate open."""

CHOOSING = 1
"""How many seeds choose the rate; the others are reported."""


def optimizer(rate: Any, name: str) -> optax.GradientTransformation:
    weighting, gate = GATED[name]
    return gdmam.weighed(optax.adam(rate), weighting, gate=gate)


def benchmark(
    names: Sequence[str],
    equations: Sequence[str],
    sets: Sequence[str],
    folder: Path,
    data_folder: Path | None,
    seeds: int,
    steps: int,
    epochs: int,
) -> list[dict[str, Any]]:
    """The median of each problem's measure by weighting, with the lowest and the highest.

    Args:
      names: of the weightings; all if there are none.
      equations: of `benchmarks.physics`.
      sets: of label distributions, ten folds.
      folder: for results; what is there is not run again.
      data_folder: where the sets lie, None for the cache.
      seeds: how many trainings are reported, of equations and digits.
      steps: of each training of an equation.
      epochs: of each fold's training.
    """
    chosen = list(names or GATED)
    scale = SMALL._replace(steps=steps)
    columns = {
        each: functools.partial(network, each, scale=scale, seeds=seeds) for each in equations
    }
    columns["digits"] = functools.partial(digits, seeds=seeds)
    methods = [
        Method(name, name, functools.partial(optimizer, name=name), flat=True) for name in chosen
    ]
    found = {
        each: distributions(folder / Path(each).stem, each, methods, epochs, data_folder)
        for each in sets
    }
    rows, settings = [], {"seeds": seeds, "steps": steps}
    for name in timing.tracked("weightings", chosen):
        runs = {
            problem: kept(folder / problem / f"{name}.json", settings, functools.partial(run, name))
            for problem, run in columns.items()
        }
        runs |= {each: at_end[name] for each, at_end in found.items()}
        rows.append({"weighting": name} | {key: timing.spread(each) for key, each in runs.items()})
    return rows


def kept(path: Path, settings: dict[str, int], run: Callable[[], np.ndarray]) -> list[float]:
    """The scores that are in the file, or those of a run, which are then kept in it."""
    if not already_run(path, settings):
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(path, {"settings": settings, "scores": run().tolist()})
    return json.loads(path.read_text())["scores"]


def network(equation: str, name: str, scale: Any, seeds: int) -> np.ndarray:
    """Relative errors of the learned solution; lower is better."""

    def errors(rates: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        method = lambda rate, *_: optimizer(rate, name)  # noqa: E731
        final = train_network(EQUATIONS[equation], method, rates, numbers, scale).errors[:, -1]
        return final, final

    return at_the_best_rate(errors, seeds, lower=True)


def digits(name: str, seeds: int) -> np.ndarray:
    """Shares of digits read right; higher is better."""
    kind = images.shared_trunk()

    def scores(rates: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        program = lambda rate, _: optimizer(rate, name)  # noqa: E731
        found = train_kind(kind, program, rates, np.zeros(len(rates)), numbers)
        return found.chosen_by, found.score

    return at_the_best_rate(scores, seeds, lower=False)


def at_the_best_rate(
    run: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], seeds: int, lower: bool
) -> np.ndarray:
    """The scores of the reported seeds at the rate that is best on the others."""
    rates, numbers = np.meshgrid(RATES, np.arange(seeds + CHOOSING), indexing="ij")
    choosing, reported = (each.reshape(rates.shape) for each in run(rates.ravel(), numbers.ravel()))
    scores = np.nan_to_num(choosing[:, seeds:].mean(axis=1), nan=np.inf if lower else -np.inf)
    return reported[np.argmin(scores) if lower else np.argmax(scores), :seeds]
