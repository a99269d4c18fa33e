"""Command line of the benchmark of kinds of problems."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import timing
from benchmarks.kinds import adversarial, game, images, others, regularisers
from benchmarks.kinds import delta as deltas
from benchmarks.kinds import report as reports
from benchmarks.kinds.kind import Kind
from benchmarks.kinds.methods import METHODS, programs
from benchmarks.kinds.training import train
from benchmarks.options import Output, already_run, known_names
from gdmam_jax.ldl.laboratory import storage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train a small problem of each kind by several methods, and compare what people measure.",
)
KINDS: dict[str, Callable[[], Kind]] = {
    "vae": images.vae,
    "beta-vae": functools.partial(images.vae, 4.0),
    "shared-trunk": images.shared_trunk,
    "scales": others.scales,
    "standardised": functools.partial(others.scales, True),
    "distillation": images.distillation,
    "forces": others.forces,
    "actor-critic": game.actor_critic,
    "language-model": others.language_model,
    "robustness": images.robustness,
    "contrastive": images.contrastive,
    "vq-gan": adversarial.vq_gan,
    "consistency": regularisers.consistency,
    "conservation": regularisers.conservation,
    "denoising": regularisers.denoising,
}
Folder = Annotated[Path, typer.Option(help="Folder for results; finished runs are not repeated.")]


@app.command()
def run(
    out: Folder = Path("results/kinds"),
    kinds: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(KINDS),
    seeds: Annotated[int, typer.Option(help="Seeds of the results.", min=1)] = 5,
    tuning_seeds: Annotated[
        int, typer.Option(help="Other seeds, by which rates and factors are chosen.", min=1)
    ] = 2,
    steps: Annotated[int | None, typer.Option(help="Steps, if not the kind's own.", min=1)] = None,
) -> None:
    """Train each kind by each method, with every rate and seed; resumes where it stopped."""
    settings = {"seeds": seeds, "tuning_seeds": tuning_seeds, "steps": steps}
    out.mkdir(parents=True, exist_ok=True)
    for name in known_names(kinds, list(KINDS)):
        kind = KINDS[name]()
        if steps is not None:
            kind = kind._replace(steps=steps)
        for program in programs(kind):
            path = out / f"{name}-{program}.json"
            if already_run(path, settings):
                continue
            started = time.perf_counter()
            record = _every_run(kind, program, seeds + tuning_seeds)
            seconds = time.perf_counter() - started
            storage.write_json(path, record | {"settings": settings, "seconds": seconds})
            typer.echo(f"{name}, {program}: {seconds:.0f} s", err=True)
    report(out)


def _every_run(kind: Kind, program: str, seeds: int) -> dict[str, Any]:
    """All methods of a program, with all rates and seeds: lists in this order."""
    methods = {name: m.setting for name, m in METHODS.items() if m.program == program}
    axes = [list(methods.values()), kind.rates, range(seeds)]
    settings, rates, numbers = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    found = train(kind, program, rates, settings, numbers)
    shape = [len(axis) for axis in axes]
    return {
        "methods": list(methods),
        "rates": kind.rates,
        **{name: each.reshape(shape).tolist() for name, each in found._asdict().items()},
    }


@app.command()
def delta(
    problems: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(deltas.PROBLEMS),
    seeds: Annotated[int, typer.Option(help="Seeds of parameters and batches.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Steps of each training.", min=1)] = 200,
    rate: Annotated[float, typer.Option(help="Rate of Adam, for all.", min=0)] = 3e-3,
    output: Output = None,
) -> None:
    """Multi-task learning: the relative change to single tasks, here and in other libraries."""
    names = known_names(problems, list(deltas.PROBLEMS))
    rows = deltas.benchmark(names, seeds, steps, rate)
    timing.report(f"delta m, {seeds} seeds, {steps} steps", rows, output)


@app.command()
def report(
    out: Folder = Path("results/kinds"),
    csv: Annotated[Path | None, typer.Option(help="Where to write every score.")] = None,
) -> None:
    """Print the table of what has been run."""
    kinds = {name: make() for name, make in KINDS.items() if any(out.glob(f"{name}-*.json"))}
    if not kinds:
        raise typer.BadParameter(f"no results in {out}; run the benchmark first")
    rows = reports.rows(kinds, out)
    typer.echo(reports.table(rows))
    if csv is not None:
        reports.write_csv(rows, csv)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.kinds")
