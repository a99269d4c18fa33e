"""Command line of the physics-informed benchmark."""

import importlib.util
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks import timing
from benchmarks.options import (
    Output,
    Rounds,
    Threads,
    already_run,
    known_name,
    known_names,
    learning_rates,
)
from benchmarks.physics import report as reports
from benchmarks.physics.equations import CHOSEN_ON, EQUATIONS, HELD_OUT
from benchmarks.physics.methods import ALL_METHODS, CHOICES
from benchmarks.physics.quasi_newton import PLANS
from benchmarks.physics.training import (
    EXTRAS,
    SCALES,
    WARM_UP,
    Scale,
    objective,
    train,
)
from gdmam_jax.ldl.laboratory import storage

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Train physics-informed networks by several methods, and compare their errors.",
)
TUNING_SEEDS = 1000
"""The first of the seeds on which rates are tuned; results have seeds from 0."""

DEFAULTS = ",".join(name for name in ALL_METHODS if name not in [*CHOICES, *PLANS])

Losses = Annotated[
    int,
    typer.Option(help="2: residual and data. 3: residual, boundary and initial.", min=2, max=3),
]
Configuration = Annotated[
    str,
    typer.Option(
        help="small: 4 x 32 networks. For a GPU, config: the ConFIG paper's 5 x 50 networks, fewer "
        "points; jaxpi: its examples' default, for --rates 1e-3."
    ),
]
Methods = Annotated[str, typer.Option(help=f"Comma-separated, or all: {', '.join(ALL_METHODS)}.")]
Folder = Annotated[Path, typer.Option(help="Folder for results; finished runs are not repeated.")]


def _chosen(text: str, known: list[str]) -> list[str]:
    return known if text == "all" else known_names(text, known)


@app.command()
def run(
    out: Folder = Path("results/physics"),
    equations: Annotated[
        str, typer.Option(help=f"Comma-separated, or all: {', '.join(EQUATIONS)}.")
    ] = ",".join([*CHOSEN_ON, *HELD_OUT]),
    methods: Methods = DEFAULTS,
    losses: Losses = 2,
    rates: Annotated[str, typer.Option(help="Peak learning rates to tune over.")] = "3e-3,1e-2",
    seeds: Annotated[int, typer.Option(help="Seeds of the results, from 0.", min=1)] = 5,
    tuning_seeds: Annotated[int, typer.Option(help="Seeds that tune the rate.", min=1)] = 2,
    steps: Annotated[
        int | None, typer.Option(help="Steps, if not the configuration's.", min=1)
    ] = None,
    points: Annotated[
        int | None, typer.Option(help="Points inside, if not the configuration's.", min=1)
    ] = None,
    configuration: Configuration = "small",
    extras: Annotated[
        str, typer.Option(help=f"What else may help, comma-separated: {', '.join(EXTRAS)}.")
    ] = "",
) -> None:
    """Tune each method's rate on separate seeds, then train; resumes where it stopped."""
    scale = _scale(configuration, extras)
    if points is not None:
        # At least three, of which one is at the start where there is time.
        data = max(3, -(-points * scale.data_points // scale.residual_points))
        scale = scale._replace(residual_points=points, data_points=data)
    if steps is not None:
        records = scale.records
        if steps <= WARM_UP or steps % records:
            raise typer.BadParameter(
                f"--steps must be a multiple of {records} above the warm-up's {WARM_UP}, "
                f"got {steps}"
            )
        scale = scale._replace(steps=steps)
    grid = learning_rates(rates, "--rates")
    settings = {
        "scale": scale._asdict(), "rates": grid, "seeds": seeds,
        "tuning_seeds": tuning_seeds, "losses": losses,
    }  # fmt: skip
    pairs = [
        (equation, method)
        for equation in _chosen(equations, list(EQUATIONS))
        for method in _chosen(methods, ALL_METHODS)
    ]
    for pair in pairs:
        _check(*pair, scale, losses)
    out.mkdir(parents=True, exist_ok=True)
    started, fresh = time.perf_counter(), 0
    for number, (equation, method) in enumerate(pairs):
        path = out / f"{equation}-{method.replace(' ', '_')}.json"
        if already_run(path, settings):
            continue
        record = _compare(equation, method, grid, seeds, tuning_seeds, scale, losses)
        storage.write_json(path, record | {"settings": settings, "extras": extras})
        fresh += 1
        left = (time.perf_counter() - started) / fresh * (len(pairs) - number - 1)
        typer.echo(
            f"{number + 1} of {len(pairs)}: {equation}, {method}: median error "
            f"{np.median(record['errors'], axis=0)[-1]:.2e} with rate {record['rate']:g}; "
            f"about {left / 60:.0f} minutes left",
            err=True,
        )
    typer.echo(reports.table(reports.load(out)))


def _scale(configuration: str, extras: str = "") -> Scale:
    scale = SCALES[known_name(configuration, "--configuration", list(SCALES))]
    for name in known_names(extras, list(EXTRAS), optional=True):
        scale = scale._replace(**EXTRAS[name])
    return scale


def _check(equation: str, method: str, scale: Scale, losses: int) -> None:
    if method.startswith("ssbroyden") and not importlib.util.find_spec("ssbroyden_optimistix"):
        raise typer.BadParameter(
            f"{method} needs another package: pip install ssbroyden-optimistix"
        )
    try:
        objective(EQUATIONS[equation], method, scale, losses)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _compare(
    equation: str,
    method: str,
    grid: list[float],
    seeds: int,
    tuning_seeds: int,
    scale: Scale,
    losses: int,
) -> dict[str, Any]:
    """Tunes if there is a choice, then trains for the results; both run in the same program."""
    lanes = max(seeds, len(grid) * tuning_seeds) if len(grid) > 1 else seeds

    def padded(values: Any) -> np.ndarray:
        return np.resize(np.asarray(values), lanes)

    problem, rate, finals = EQUATIONS[equation], grid[0], np.array([])
    if len(grid) > 1:
        rates = padded(np.repeat(grid, tuning_seeds))
        tuned = padded(np.tile(TUNING_SEEDS + np.arange(tuning_seeds), len(grid)))
        tuning = train(problem, method, rates, tuned, scale, losses)
        finals = tuning.errors[: len(grid) * tuning_seeds, -1].reshape(len(grid), tuning_seeds)
        # The geometric mean, so that one failed run does not hide that a rate is far better.
        scores = np.nan_to_num(np.log(finals), nan=np.inf, posinf=np.inf).mean(axis=1)
        rate = grid[int(np.argmin(scores))]
    start = time.perf_counter()
    curves = train(problem, method, np.full(lanes, rate), padded(range(seeds)), scale, losses)
    seconds = time.perf_counter() - start
    return {
        "equation": equation,
        "method": method,
        "rate": rate,
        "tuning": finals.tolist(),
        "errors": curves.errors[:seeds].tolist(),
        "cosines": curves.cosines[:seeds].tolist(),
        "milliseconds": 1e3 * seconds / scale.steps / lanes,
    }


@app.command()
def report(
    out: Annotated[
        list[Path], typer.Option(help="Folders; of a run in several, the first's counts.")
    ] = [Path("results/physics")],  # noqa: B006
    picture: Annotated[
        Path | None, typer.Option(help="Where to draw the first folder's curves.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Where to write every final error of all folders.")
    ] = None,
    step: Annotated[
        Path | None,
        typer.Option(help="What `step --output` wrote, for a picture over seconds on one core."),
    ] = None,
) -> None:
    """Print a table of what is in each folder; draw the errors over the steps, or over seconds."""
    folders = [reports.load(folder) for folder in out]
    for folder, records in zip(out, folders, strict=True):
        if not records:
            raise typer.BadParameter(f"no results in {folder}; run the benchmark first")
        typer.echo(reports.table(records))
    records = folders[0]
    if picture is not None and step is None:
        reports.draw(records, picture)
    elif picture is not None:
        rows = json.loads(step.read_text())["rows"]
        times = {row["method"]: row["milliseconds a step"] for row in rows}
        try:
            reports.draw_over_seconds(records, times, picture)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    if csv is not None:
        reports.write_csv(folders, csv)


@app.command()
def finals(
    csv: Annotated[Path, typer.Argument(help="What `report --csv` wrote.", exists=True)],
    picture: Annotated[Path, typer.Argument(help="Where to draw.")],
) -> None:
    """Draw the final errors of all runs in a file."""
    try:
        reports.draw_finals(csv, picture)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def step(
    equation: Annotated[str, typer.Option(help="One name.")] = "burgers",
    methods: Methods = DEFAULTS,
    losses: Losses = 2,
    steps: Annotated[int, typer.Option(help="Steps in one measurement.", min=1)] = 50,
    rounds: Rounds = 20,
    configuration: Configuration = "small",
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Time of a step of each method, over one of the summed loss and one of the pair's sum."""
    timing.use_threads(threads)
    from benchmarks.physics import step as module

    problem = known_name(equation, "--equation", list(EQUATIONS))
    # Quasi-Newton methods have steps of two kinds.
    scale = _scale(configuration)
    chosen = _chosen(methods, [name for name in ALL_METHODS if name not in PLANS])
    for method in chosen:
        _check(problem, method, scale, losses)
    rows = module.benchmark(EQUATIONS[problem], chosen, scale, losses, steps, rounds)
    timing.report(f"physics step: {problem}, {losses} losses, one network", rows, output)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.physics")
