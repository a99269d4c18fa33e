"""Which choices should be `gdmam`'s defaults: one rule over networks and label distributions.

The rule is: the fewest failed runs in all, then the smallest worst ratio to the best candidate's
median. The table also shows what becomes of a training when one of its losses is solved.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks.physics.__main__ import run
from benchmarks.physics.methods import OURS
from benchmarks.physics.report import FAILED, finals, load
from gdmam_jax.ldl import data
from gdmam_jax.ldl.laboratory import experiment, results
from gdmam_jax.ldl.laboratory.methods import Method
from gdmam_jax.ldl.laboratory.protocol import Configuration

SOLVED = {
    "solved, falling rate": (1e-3, True),
    "solved, constant rate": (1e-3, False),
    "noisy, falling rate": (1.0, True),
}
"""A solved loss's gradient norm over the prediction's at first, and whether the rate falls."""

SEEDS = 5
RATES = (3e-3, 1e-2)
SELECTION = "natural"
"""Which epoch of a training on label distributions is tested."""


def benchmark(
    folder: Path,
    equations: Sequence[str],
    sets: Sequence[str],
    epochs: int,
    steps: int | None,
    data_folder: Path | None,
) -> list[dict[str, Any]]:
    """Runs what is not yet in the folder, and judges all candidates.

    Args:
      folder: for results; what is there is not run again.
      equations: of `benchmarks.physics`, five seeds.
      sets: of label distributions, ten folds.
      epochs: of every fold's training.
      steps: of every network's training; None for the benchmark's own.
      data_folder: where the sets lie, None for the cache.

    Returns:
      One row for each candidate, best first: its median by problem, failed runs, worst ratio, and
      then its medians where a loss is solved.
    """
    found = networks(folder / "physics", equations, steps)
    failed = {
        name: sum(np.sum(~(each[name] <= FAILED)) for each in found.values()) for name in OURS
    }
    methods = [
        Method(candidate, candidate, functools.partial(gdmam.gdmam, amsgrad=True, **choices))
        for candidate, choices in OURS.items()
    ]
    for name in sets:
        found[name] = distributions(folder / Path(name).stem, name, methods, epochs, data_folder)
        for candidate, runs in found[name].items():
            failed[candidate] += np.sum(~np.isfinite(runs))
    beside = {problem: solved(*each) for problem, each in SOLVED.items()}
    medians = {
        problem: {name: float(np.median(runs[name])) for name in OURS}
        for problem, runs in (found | beside).items()
    }
    rows = []
    for name in OURS:
        row = {"candidate": name} | {problem: medians[problem][name] for problem in found}
        ratios = [row[problem] / min(medians[problem].values()) for problem in found]
        row |= {"failed": int(failed[name]), "worst ratio": max(ratios)}
        rows.append(row | {problem: medians[problem][name] for problem in beside})
    return sorted(rows, key=lambda row: (row["failed"], row["worst ratio"]))


def networks(
    folder: Path, equations: Sequence[str], steps: int | None
) -> dict[str, dict[str, np.ndarray]]:
    """Final relative errors, by equation and candidate."""
    run(folder, ",".join(equations), ",".join(OURS), steps=steps, seeds=SEEDS)
    records = load(folder)
    return {
        equation: {name: finals(records[equation][name]) for name in OURS} for equation in equations
    }


def distributions(
    folder: Path, name: str, methods: Sequence[Method], epochs: int, data_folder: Path | None
) -> dict[str, np.ndarray]:
    """Test KLDs of the folds by method, at the rate and epoch that natural rows choose."""
    dataset = data.find(name, folder=data_folder, normalize=True, drop_constant=True)
    configuration = Configuration(seeds=1, epochs=epochs, learning_rates=RATES)
    experiment.run(dataset, methods, configuration, folder=folder)
    return {
        result.name: result.values("kld", SELECTION).ravel()
        for result in results.load(folder).methods
    }


def solved(noise: float, falling: bool, steps: int = 2000, width: int = 20) -> dict[str, Any]:
    """Distances from a linear regression's solution, by candidate.

    The alignment loss is solved: its gradient is `noise` times as long as the prediction's at
    first, of random direction, at every step.
    """
    cosine = optax.schedules.warmup_cosine_decay_schedule(0.0, 0.01, steps // 20, steps)
    rate = cosine if falling else 0.01
    optimizers = {
        name: gdmam.gdmam(rate, weight_decay=0.0, **choices) for name, choices in OURS.items()
    }

    def distance(seed: jax.Array, optimizer: optax.GradientTransformation) -> jax.Array:
        first, second = jax.random.split(jax.random.key(seed))
        solution = jax.random.normal(first, (width,))
        scale = noise * 2 * jnp.linalg.norm(solution) / jnp.sqrt(width)

        def losses(weights: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            rows = jax.random.normal(key, (1 + width // 2, width))
            error = jnp.mean((rows[1:] @ (weights - solution)) ** 2)
            return error, scale * weights @ rows[0]

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            weights, state = carry
            _, pairs = gdmam.value_and_paired_grad(losses)(weights, key)
            updates, state = optimizer.update(pairs, state, weights)
            return (optax.apply_updates(weights, updates), state), None

        start = jnp.zeros(width)
        keys = jax.random.split(second, steps)
        weights = jax.lax.scan(step, (start, optimizer.init(start)), keys)[0][0]
        return jnp.linalg.norm(weights - solution) / jnp.linalg.norm(solution)

    return {
        name: np.asarray(jax.vmap(functools.partial(distance, optimizer=each))(jnp.arange(SEEDS)))
        for name, each in optimizers.items()
    }
