"""Command line of the benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import timing
from benchmarks.options import (
    Losses,
    Output,
    Rounds,
    Threads,
    data_sets,
    known_name,
    known_names,
    loss_counts,
    numbers,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Ratios of things measured in turn in one run; medians with quartiles.",
)

DTYPES = ["float32", "bfloat16", "float16"]


@app.command()
def update(
    parameters: Annotated[float, typer.Option(help="How many, for example 1e7.", min=1)] = 1e6,
    leaves: Annotated[str, typer.Option(help="Numbers of leaves, comma-separated.")] = "4,400",
    dtype: Annotated[str, typer.Option(help="Dtype of parameters and gradients.")] = "float32",
    mu_dtype: Annotated[str | None, typer.Option(help="Dtype of the momenta.")] = None,
    only: Annotated[str, typer.Option(help="Optimizers, comma-separated (all).")] = "",
    steps: Annotated[int, typer.Option(help="Steps in one call, in lax.scan.", min=1)] = 1,
    losses: Losses = "2",
    torch: Annotated[bool, typer.Option("--torch", help="Also time TorchJD on the CPU.")] = False,
    rounds: Rounds = 20,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """The update alone, compared with summed(optax.adamw) and a copy of as many bytes."""
    timing.use_threads(threads)
    from benchmarks import update as module

    counts = numbers(leaves, "--leaves")
    if max(counts) > parameters:
        raise typer.BadParameter(f"--leaves must be at most {int(parameters)}, got {leaves}")
    chosen = known_names(only, list(module.OPTIMIZERS), optional=True)
    known_name(dtype, "--dtype", DTYPES)
    if mu_dtype is not None:
        known_name(mu_dtype, "--mu-dtype", DTYPES)
    number = loss_counts(losses)
    rows = module.benchmark(
        int(parameters), counts, dtype, mu_dtype, rounds, chosen, steps, number, torch
    )
    title = f"update, {parameters:g} parameters, {dtype}, {steps} steps a call"
    timing.report(title, rows, output)


@app.command()
def pair(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mlp,resnet,transformer",
    losses: Losses = "2",
    batch: Annotated[int, typer.Option(help="Examples in a batch.", min=1)] = 64,
    width: Annotated[int, typer.Option(help="Width of the layers.", min=8)] = 128,
    rematerialise: Annotated[
        bool, typer.Option(help="Compute activations again in JAX's backward passes.")
    ] = False,
    rounds: Rounds = 20,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """The losses' gradients from one forward pass, compared with the sum's, PyTorch and TorchJD."""
    timing.use_threads(threads)
    from benchmarks import pair as module

    chosen = known_names(models, list(module.MODELS))
    rows = module.benchmark(chosen, loss_counts(losses), batch, width, rounds, rematerialise)
    title = f"pair, batch {batch}, width {width}" + rematerialise * ", rematerialised"
    timing.report(title, rows, output)


@app.command()
def fork(
    models: Annotated[str, typer.Option(help="Comma-separated.")] = "mlp,resnet,transformer",
    losses: Losses = "2,3,5",
    batch: Annotated[int, typer.Option(help="Examples in a batch.", min=1)] = 64,
    width: Annotated[int, typer.Option(help="Width of the layers.", min=8)] = 128,
    rounds: Rounds = 20,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Conflicts settled at the features, compared with the sum, pairs, PyTorch and TorchJD."""
    timing.use_threads(threads)
    from benchmarks import fork as module

    chosen = known_names(models, list(module.MODELS))
    rows = module.benchmark(chosen, loss_counts(losses), batch, width, rounds)
    timing.report(f"fork, batch {batch}, width {width}", rows, output)


@app.command()
def many(
    losses: Losses = "8,32,128",
    parameters: Annotated[float, typer.Option(help="How many, for example 1e6.", min=100)] = 1e6,
    chunk: Annotated[int, typer.Option(help="Gradients held at once.", min=1)] = 16,
    given: Annotated[
        bool, typer.Option("--given", help="Time only the combination of given gradients.")
    ] = False,
    rounds: Rounds = 5,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """One weighed gradient of a loss for each example, compared with TorchJD's two engines."""
    timing.use_threads(threads)
    from benchmarks import many as module

    counts, size = loss_counts(losses), int(parameters)
    if given:
        rows = module.given(counts, size, rounds)
    else:
        rows = module.benchmark(counts, size, chunk, rounds)
    title = f"many, {parameters:g} parameters, UPGrad" + given * ", gradients given"
    timing.report(title, rows, output)


@app.command()
def step(
    data: Annotated[str, typer.Option(help="Data sets, comma-separated.")] = "movie,emotion6",
    steps: Annotated[int, typer.Option(help="Steps in one measurement.", min=1)] = 20,
    rounds: Rounds = 10,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """A training step of RDA, compared with PyTorch as the released code is written."""
    timing.use_threads(threads)
    from benchmarks import step as module

    rows = module.step(known_names(data, list(module.SHAPES)), steps, rounds)
    timing.report("step, batch 50, float32", rows, output)


@app.command()
def experiment(
    data: Annotated[str, typer.Option(help="movie, emotion6 or scut_fbp.")] = "movie",
    folds: Annotated[int, typer.Option(min=2)] = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    method: Annotated[str, typer.Option(help="gdmam-released or rda.")] = "gdmam-released",
    log_variance_bound: Annotated[
        float, typer.Option(help="Soft bound on the log-variances; 0: none, as released.", min=0)
    ] = 2.0,
    rounds: Annotated[int, typer.Option(help="Seeds, one round each.", min=1)] = 1,
    threads: Threads = None,
    output: Output = None,
) -> None:
    """A whole experiment, compilation included, compared with the same in PyTorch."""
    timing.use_threads(threads)
    from benchmarks import step as module

    name = known_name(data, "--data", list(module.SHAPES))
    method = known_name(method, "--method", list(module.rda_torch.TRAINERS))
    rows = module.whole(name, method, folds, epochs, rounds, log_variance_bound or None)
    timing.report(f"experiment, {folds} folds, {epochs} epochs", rows, output)


@app.command(name="compile")
def compile_time(
    leaves: Annotated[str, typer.Option(help="Numbers of leaves, comma-separated.")] = "10,100",
    shape: Annotated[str, typer.Option(help="Shape of each leaf, comma-separated.")] = "64,64",
    only: Annotated[str, typer.Option(help="Optimizers, comma-separated (all).")] = "",
    losses: Losses = "2",
    threads: Threads = None,
    output: Output = None,
) -> None:
    """Time to the first step, and size of the program, by number of leaves and losses."""
    timing.use_threads(threads)
    from benchmarks import compilation as module

    chosen = known_names(only, list(module.OPTIMIZERS), optional=True)
    counts, sides = numbers(leaves, "--leaves"), numbers(shape, "--shape")
    rows = module.benchmark(counts, sides, loss_counts(losses), chosen)
    timing.report(f"compile, leaves of {shape}", rows, output)


@app.command()
def defaults(
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished runs are not repeated.")
    ] = Path("results/defaults"),
    equations: Annotated[
        str, typer.Option(help="Equations of benchmarks.physics, comma-separated.")
    ] = "burgers,kovasznay,helmholtz,soliton",
    sets: Annotated[
        str, typer.Option(help="Label distributions, comma-separated; see gdmam-ldl data list.")
    ] = "emotion6,films,Movie,SCUT_FBP",
    epochs: Annotated[int, typer.Option(help="Epochs on label distributions.", min=1)] = 100,
    steps: Annotated[
        int | None, typer.Option(help="Steps on equations (as many as their own).", min=1)
    ] = None,
    data_folder: Annotated[
        Path | None, typer.Option(help="Folder of the label distributions, if not the cache.")
    ] = None,
    output: Output = None,
) -> None:
    """Judge candidates for gdmam's defaults by one rule, on equations and distributions."""
    from benchmarks import defaults as module
    from benchmarks.physics.equations import EQUATIONS

    named = known_names(equations, list(EQUATIONS))
    rows = module.benchmark(out, named, data_sets(sets), epochs, steps, data_folder)
    timing.report("defaults: medians, and the worst ratio to the best", rows, output)


@app.command()
def absent(
    only: Annotated[str, typer.Option(help="Weightings, comma-separated (all).")] = "",
    steps: Annotated[int, typer.Option(help="Steps of each training.", min=1)] = 400,
    seeds: Annotated[int, typer.Option(help="Trainings of each weighting.", min=1)] = 5,
    output: Output = None,
) -> None:
    """A task whose labels are often missing: what is left of the other, by weighting."""
    from benchmarks import absent as module

    rows = module.benchmark(known_names(only, list(module.WEIGHTINGS), optional=True), steps, seeds)
    timing.report(f"absent: prediction test loss, {steps} steps, {seeds} seeds", rows, output)


@app.command()
def weightings(
    out: Annotated[
        Path, typer.Option(help="Folder for results; finished runs are not repeated.")
    ] = Path("results/weightings"),
    only: Annotated[str, typer.Option(help="Weightings, comma-separated (all).")] = "",
    equations: Annotated[
        str, typer.Option(help="Equations of benchmarks.physics, comma-separated.")
    ] = "burgers,reaction",
    sets: Annotated[
        str, typer.Option(help="Label distributions, comma-separated; see gdmam-ldl data list.")
    ] = "SCUT_FBP",
    seeds: Annotated[int, typer.Option(help="Seeds on equations and digits.", min=1)] = 3,
    steps: Annotated[int, typer.Option(help="Steps on equations.", min=101)] = 1000,
    epochs: Annotated[int, typer.Option(help="Epochs on label distributions.", min=1)] = 100,
    data_folder: Annotated[
        Path | None, typer.Option(help="Folder of the label distributions, if not the cache.")
    ] = None,
    output: Output = None,
) -> None:
    """Every weighting on equations, label distributions and two digits with one trunk."""
    from benchmarks import weightings as module
    from benchmarks.physics.equations import EQUATIONS

    rows = module.benchmark(
        known_names(only, list(module.GATED), optional=True),
        known_names(equations, list(EQUATIONS), optional=True),
        data_sets(sets),
        out,
        data_folder,
        seeds,
        steps,
        epochs,
    )
    timing.report("weightings, in front of Adam: medians (lowest to highest)", rows, output)


@app.command()
def soak(
    steps: Annotated[float, typer.Option(help="Number of steps, for example 1e6.", min=100)] = 1e6,
    dtypes: Annotated[
        str, typer.Option(help="Dtypes of the parameters, comma-separated.")
    ] = "float32,bfloat16",
    only: Annotated[str, typer.Option(help="Optimizers, comma-separated (all).")] = "",
    threads: Threads = None,
    output: Output = None,
) -> None:
    """A long training against float64: drift, bounds, memory, counters; fails if one breaks."""
    timing.use_threads(threads)
    from benchmarks import soak as module

    count = int(steps) // module.CALLS * module.CALLS
    chosen = known_names(dtypes, DTYPES)
    rows = module.benchmark(
        count, chosen, known_names(only, list(module.OPTIMIZERS), optional=True)
    )
    timing.report(f"soak, {count:,} steps", rows, output)
    if any(row["held"] == "NO" for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
