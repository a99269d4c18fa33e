"""The command line of the label distribution laboratory: `gdmam-ldl`."""

import contextlib
import dataclasses
import inspect
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand

from gdmam_jax.ldl import data as sets
from gdmam_jax.ldl.imbalance import ROWS, Factor, FoundThresholds
from gdmam_jax.ldl.laboratory import compare as comparison
from gdmam_jax.ldl.laboratory import experiment, progress, report, results, tables
from gdmam_jax.ldl.laboratory.methods import METHODS, Method, find
from gdmam_jax.ldl.laboratory.protocol import SELECTIONS, Configuration

app = typer.Typer(
    help="Label distribution learning under imbalance: data sets, experiments, reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Data sets that can be fetched.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()


class _Listing(TyperCommand):
    """`--help` that lists what can be named."""

    def format_help(self, *args: Any) -> None:
        methods = ", ".join(f"{name} ({method.label})" for name, method in METHODS.items())
        selections = "; ".join(f"{name}, {meaning}" for name, meaning in SELECTIONS.items())
        self.epilog = (
            f"Methods: {methods}.\n\nSets: films, {', '.join(sets.REGISTRY)}.\n\n"
            f"Selections (every run is tested with each): {selections}."
        )
        super().format_help(*args)


_Imbalance = Annotated[
    str,
    typer.Option(
        help="Which rows training folds keep. auto: as the set's papers do, or all rows of an "
        "unknown file; thresholds: the papers' rule, with thresholds found in the data; a number: "
        "rows whose largest label mass is that many times the smallest; none: all."
    ),
]


@app.command(cls=_Listing)
def run(
    out: Annotated[Path, typer.Option(help="Folder for results; an experiment in it is resumed.")],
    data: Annotated[
        str, typer.Option(help="A set's name (below), or a .mat, .npz or .csv file.")
    ] = "films",
    methods: Annotated[
        str, typer.Option(help="Names (below), separated by commas, or all.")
    ] = "gdmam-pcgrad, gdmam, pcgrad, rda",
    imbalance: _Imbalance = "auto",
    rows: Annotated[
        int | None,
        typer.Option(help="Rows kept with --imbalance thresholds or a number; 100 if not given."),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.")] = 10,
    seeds: Annotated[int, typer.Option(help="Repetitions of every fold.")] = 5,
    epochs: Annotated[int, typer.Option(help="Epochs of every run.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Rows in a step.")] = 50,
    validation_size: Annotated[int, typer.Option(help="Rows held out of training.")] = 20,
    hidden: Annotated[int, typer.Option(help="Width of the model.")] = 100,
    learning_rates: Annotated[
        str, typer.Option(help="Separated by commas; all are tried, and the report chooses.")
    ] = "1e-3",
    alignment_weight: Annotated[float, typer.Option(help="Each of RDA's three lambdas.")] = 0.1,
    log_variance_bound: Annotated[
        float, typer.Option(help="Soft bound on the log-variances; 0: none, as released.")
    ] = 2.0,
    chunk: Annotated[int, typer.Option(help="Epochs between tests and progress lines.")] = 25,
    data_folder: Annotated[
        Path | None, typer.Option(help="Folder of registered data sets, if not the cache.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option(help="Divide rows of labels by their sum instead of refusing them.")
    ] = False,
    drop_constant: Annotated[
        bool, typer.Option(help="Leave out constant features instead of refusing them.")
    ] = False,
    report_too: Annotated[
        bool, typer.Option("--report/--no-report", help="Write tables, pictures and a page.")
    ] = True,
) -> None:
    """Train and test methods on a data set's folds, and write tables, pictures and a page."""
    configuration = Configuration(
        folds=folds,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size,
        validation_size=validation_size,
        hidden=hidden,
        alignment_weight=alignment_weight,
        log_variance_bound=log_variance_bound or None,
        learning_rates=_numbers(learning_rates, "--learning-rates"),
        chunk=chunk,
    )
    names = list(METHODS) if methods == "all" else _names(methods)
    chosen = [find(name) for name in dict.fromkeys(names)]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: _note(str(message))
        dataset = sets.find(
            data, folder=data_folder, normalize=normalize, drop_constant=drop_constant
        )
        _train(_imbalanced(dataset, imbalance, rows), chosen, configuration, out)
    if report_too:
        report_command(out)


def _train(
    dataset: sets.Dataset, methods: Sequence[Method], configuration: Configuration, out: Path
) -> None:
    totals = {method.label: experiment.work(method, configuration) for method in methods}
    with progress.shown(console, totals, configuration.chunk) as show:
        experiment.run(dataset, methods, configuration, folder=out, progress=show)


def _note(text: str) -> None:
    console.print(f"[yellow]{escape(_spelled(text))}[/yellow]", soft_wrap=True)


def _imbalanced(dataset: sets.Dataset, imbalance: str, rows: int | None) -> sets.Dataset:
    """The data set with the sampler that `--imbalance` asks for."""
    if imbalance in ("auto", "none"):
        if rows is not None:
            raise ValueError("--rows needs --imbalance thresholds, or a number")
        return dataset if imbalance == "auto" else dataclasses.replace(dataset, sampler=None)
    size = ROWS if rows is None else rows
    if imbalance == "thresholds":
        return dataclasses.replace(dataset, sampler=FoundThresholds(size))
    try:
        factor = float(imbalance)
    except ValueError:
        factor = float("nan")
    if not factor >= 1:
        raise ValueError(
            f"--imbalance must be auto, thresholds, none or a number from 1, got {imbalance!r}"
        )
    return dataclasses.replace(dataset, sampler=Factor(factor, size))


def _spelled(message: str) -> str:
    """A message of the library with its arguments as the command line spells them."""
    names = "|".join([*inspect.signature(run).parameters, "tuning"])
    return re.sub(
        rf"(?<!-)\b({names})(=True\b|(?= must be | = ))",
        lambda match: "--" + match[1].replace("_", "-"),
        message.replace("give it a sampler", "give --imbalance thresholds, or a number"),
    )


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, got {text!r}") from None


_Tuning = Annotated[
    str | None,
    typer.Option(
        help="Held-out rows that choose learning rate and setting: validation, reweighted or "
        "natural; if not given, those that choose the epoch, or natural ones if none do."
    ),
]


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(help="An experiment's folder.")],
    tuning: _Tuning = None,
    selection: Annotated[
        str, typer.Option(help="Selections, separated by commas, or all; see run --help.")
    ] = "all",
) -> None:
    """Write tables, pictures and a page from what was trained; nothing is trained again."""
    names = report.selections(None if selection == "all" else _names(selection))
    found = results.load(folder)
    page = report.write(found, tuning=tuning, selected=names)
    text = tables.summary(found, names, tuning)
    console.print(text, markup=False, soft_wrap=True, highlight=False)
    console.print(f"page: {page}", soft_wrap=True)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Experiments' folders, one per data set.")],
    tuning: _Tuning = None,
    selection: Annotated[str, typer.Option(help="A selection; see run --help.")] = "natural",
    reference: Annotated[str, typer.Option(help="Method against which wins count.")] = "rda",
    out: Annotated[
        Path | None,
        typer.Option(help="Also write OUT.md, OUT.csv and the diagram OUT.png."),
    ] = None,
) -> None:
    """Rank the methods over several data sets: a table, and a critical-difference diagram."""
    (selected,) = report.selections([selection])
    found = comparison.compare(folders, selected, tuning, reference=reference)
    text = comparison.markdown(found)
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        page, rows, diagram = (out.with_name(out.name + end) for end in (".md", ".csv", ".png"))
        page.write_text(text, encoding="utf-8")
        comparison.write_csv(found, rows)
        judged = comparison.judged(found)
        if judged["data"].nunique() > 1 and judged["method"].nunique() > 2:
            comparison.draw(found, diagram)
        else:
            diagram.unlink(missing_ok=True)  # it would be of another comparison


@data_app.command("list")
def data_list() -> None:
    """The data sets that can be fetched, and which are in the cache."""
    table = Table("name", "git blob id", "fetched")
    for name, blob in sets.REGISTRY.items():
        fetched = (sets.cache_folder() / f"{name}.mat").is_file()
        table.add_row(name, blob, "yes" if fetched else "")
    console.print(table)
    console.print(f"films is built in. The cache is {sets.cache_folder()}.")


@data_app.command("fetch")
def data_fetch(
    names: Annotated[list[str], typer.Argument(help="Names that data list shows, or all.")],
    folder: Annotated[Path | None, typer.Option(help="Folder to use, if not the cache.")] = None,
) -> None:
    """Fetch data sets and verify them; a download that broke off is continued."""
    for name in list(sets.REGISTRY) if names == ["all"] else names:
        console.print(f"{name}: {sets.fetch(name, folder=folder)}", soft_wrap=True)


def keep_compiled() -> None:
    """Let JAX keep compiled programs in the user's cache, unless it keeps them elsewhere."""
    folder = sets.cache_folder() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    unset = jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
    if unset and os.access(folder, os.W_OK):  # else JAX would warn about every program
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def main() -> None:
    """Run the command line; wrong input ends in one line, not a traceback."""
    keep_compiled()
    try:
        app()
    except (ValueError, OSError) as error:
        text = f"[red]error:[/red] {escape(_spelled(str(error)))}"
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
