"""The command line of the label distribution laboratory: `gdmam-ldl`."""

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

app = typer.Typer(
    help="Label distribution learning under imbalance: data sets, experiments, reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets that can be fetched.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for results; an experiment resumes there.")],
    data: Annotated[
        str, typer.Option(help="films, a registered name (see data list), or a file.")
    ] = "films",
    methods: Annotated[str, typer.Option(help="Names, separated by commas, or all.")] = (
        "gdmam,gdmam-pcgrad,gdmam-released,rda"
    ),
    folds: Annotated[int, typer.Option(help="Of the cross-validation.")] = 10,
    seeds: Annotated[int, typer.Option(help="Repetitions of every fold.")] = 5,
    epochs: Annotated[int, typer.Option(help="Of every run.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Rows a step.")] = 50,
    validation_size: Annotated[int, typer.Option(help="Rows held out of training.")] = 20,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 100,
    learning_rates: Annotated[
        str, typer.Option(help="Tuning grid, separated by commas; chosen on held-out rows.")
    ] = "1e-3",
    tuning: Annotated[
        str, typer.Option(help="Rows that choose: validation (the papers') or natural.")
    ] = "validation",
    tuning_seeds: Annotated[int, typer.Option(help="Seeds the tuning grid is run with.")] = 1,
    alignment_weight: Annotated[float, typer.Option(help="The three lambdas.")] = 0.1,
    log_variance_bound: Annotated[
        float, typer.Option(help="Soft bound of the log-variances; 0: none, as released.")
    ] = 2.0,
    chunk: Annotated[int, typer.Option(help="Epochs between two tests and signs of life.")] = 25,
    data_folder: Annotated[
        Path | None, typer.Option(help="Where registered data sets lie, if not in the cache.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option(help="Divide rows of labels by their sum instead of refusing them.")
    ] = False,
    report_too: Annotated[
        bool, typer.Option("--report/--no-report", help="Write tables, pictures and page.")
    ] = True,
) -> None:
    """Train and test methods on a data set's folds, and write tables, pictures and a page."""
    from gdmam_jax.ldl import data as data_module
    from gdmam_jax.ldl import experiment, report
    from gdmam_jax.ldl import methods as methods_module

    configuration = experiment.Configuration(
        folds=folds,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        validation_size=validation_size,
        hidden=hidden,
        alignment_weight=alignment_weight,
        log_variance_bound=log_variance_bound or None,
        learning_rates=_numbers(learning_rates, "--learning-rates"),
        tuning=tuning,  # type: ignore[arg-type]
        tuning_seeds=tuning_seeds,
        chunk=chunk,
    )
    names = list(methods_module.METHODS) if methods == "all" else methods.split(",")
    chosen = [methods_module.find(name.strip()) for name in names]
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        dataset = data_module.find(data, folder=data_folder, normalize=normalize)
    for note in notes:
        console.print(f"[yellow]{note.message}[/yellow]")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        tasks = {method.label: bars.add_task(method.label, total=None) for method in chosen}

        def progress(label: str, done: int, total: int) -> None:
            bars.update(tasks[label], completed=done, total=total)

        experiment.run(dataset, chosen, configuration, folder=out, progress=progress)
    if report_too:
        page = report.write(out)
        console.print(report.summary(out), markup=False, soft_wrap=True)
        console.print(f"page: {page}", soft_wrap=True)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers with commas between, got {text!r}") from None


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="An experiment's folder.")],
) -> None:
    """Write tables, pictures and a page from an experiment's results."""
    from gdmam_jax.ldl import report

    page = report.write(folder)
    console.print(report.summary(folder), markup=False, soft_wrap=True)
    console.print(f"page: {page}", soft_wrap=True)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Experiments' folders, one a data set.")],
    method: Annotated[str, typer.Option(help="Which the others are compared with.")] = ("gdmam"),
    csv: Annotated[
        Path | None, typer.Option(help="Also write the runs of all of them here.")
    ] = None,
) -> None:
    """Print test KLDs of several experiments side by side, as Markdown."""
    from gdmam_jax.ldl import report

    print(report.compare(folders, method=method))
    if csv is not None:
        records = [record for folder in folders for record in report.load(folder)]
        report.write_csv(records, csv, measures=("kld", "chebyshev", "intersection"), digits=4)


@data_app.command("list")
def data_list() -> None:
    """The data sets that can be fetched, and which are in the cache."""
    from gdmam_jax.ldl import data as data_module

    table = Table("name", "git blob id", "fetched")
    for name, blob in data_module.REGISTRY.items():
        fetched = (data_module.cache_folder() / f"{name}.mat").is_file()
        table.add_row(name, blob, "yes" if fetched else "")
    console.print(table)
    console.print(f"films is built in. The cache is {data_module.cache_folder()}.")


@data_app.command("fetch")
def data_fetch(
    names: Annotated[list[str], typer.Argument(help="Names that data list shows, or all.")],
    folder: Annotated[Path | None, typer.Option(help="Instead of the cache.")] = None,
) -> None:
    """Fetch data sets, verified against the registry; what broke off is continued."""
    from gdmam_jax.ldl import data as data_module

    for name in list(data_module.REGISTRY) if names == ["all"] else names:
        console.print(f"{name}: {data_module.fetch(name, folder=folder)}", soft_wrap=True)


def main() -> None:
    """Run the command line; wrong input ends in one line, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
