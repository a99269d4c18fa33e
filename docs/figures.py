"""What the pages show that is written elsewhere: measurements, and docstrings.

`mkdocs.yml` names this module. A page whose first lines say ``render_macros: true`` can call its
functions. A new measurement, written over the old file, changes the page.
"""

import ast
import csv
import functools
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gdmam_jax

DOCS = Path(__file__).parent
PHYSICS = (
    "gdmam", "summed", "data x 10", "data x 100", "pcgrad", "imtl-g", "config", "m-config",
)  # fmt: skip
COMPARED = {
    "gdmam 1": "`gdmam`", "gdmam tuned": "`gdmam`, tuned", "sum tuned": "sum, tuned",
    "pcgrad": "PCGrad, UPGrad", "gradient norm": "gradient norms", "uncertainty": "uncertainty",
    "fork": "`fork`",
}  # fmt: skip
SUMS = {
    "sum x 0.01": "sum x 0.01", "sum x 1": "x 1", "sum x 100": "x 100", "sum x 1000": "x 1,000",
}  # fmt: skip
KINDS = {*COMPARED, *SUMS, "last layer 1", "last layer tuned"}
"""Methods of `benchmarks.kinds`; those with columns are in two tables that fit on a screen."""
API = (
    "gradients", "optimizers", "allocation", "weightings", "remembering", "momentum", "fork",
    "diagnostics", "nnx", "laboratory",
)  # fmt: skip
"""The pages in ``docs/api``, as in the navigation."""
FAILED = 0.5
"""Relative error from which a run of `benchmarks.physics` counts as failed."""
ODD, EVEN = slice(0, None, 2), slice(1, None, 2)
"""Halves of the sets of label distributions."""


def read(file: str) -> dict[str, Any]:
    """What a benchmark wrote to ``docs/figures/FILE.json``: rows, and how they were measured."""
    return json.loads((DOCS / "figures" / f"{file}.json").read_text())


def row(file: str, **where: Any) -> dict[str, Any]:
    """The one row of ``docs/figures/FILE.json`` whose values are those of ``where``."""
    found = [each for each in read(file)["rows"] if where.items() <= each.items()]
    if len(found) != 1:
        raise ValueError(f"expected one row of {file}.json with {where}, found {len(found)}")
    return found[0]


def figure(file: str, column: str, **where: Any) -> str:
    """A cell: a ratio with its quartiles, or a number."""
    value = row(file, **where)[column]
    if isinstance(value, dict):
        return _with_range(
            *(f"{value[key]:.{2 - (value[key] >= 10)}f}" for key in ("median", "low", "high"))
        )
    return f"{value:.3g}"


def _with_range(middle: str, low: str, high: str) -> str:
    return f"{middle}<br><small>{low} to {high}</small>"


def measured(file: str) -> str:
    """What a file's figures were measured by and on: command, processor, versions."""
    about = read(file)
    command = about["command"].split(" --output")[0]
    cores = "one core" if about["processors"] == 1 else f"{about['processors']} cores"
    return (
        f"`{command}` on {cores} of {about['processor'] or about['device']}, "
        f"jax {about['versions']['jax']}"
    )


def physics(
    file: str = "physics",
    methods: Sequence[str] = PHYSICS,
    extras: str = "",
    steps: int | None = None,
) -> dict[str, dict[str, list[float]]]:
    """The final errors in ``docs/FILE.csv``: by method, then by equation.

    With ``steps``, those of trainings of that length.
    """
    errors: dict[str, dict[str, list[float]]] = {method: defaultdict(list) for method in methods}
    with (DOCS / f"{file}.csv").open() as lines:
        for run in csv.DictReader(lines):
            wanted = run["extras"] == extras and steps in (None, int(run["steps"]))
            if run["method"] in errors and wanted:
                errors[run["method"]][run["equation"]].append(float(run["error"]))
    return errors


def physics_error(
    file: str, equation: str, method: str, extras: str = "", steps: int | None = None
) -> str:
    """One cell of `physics_table`."""
    errors = physics(file, [method], extras, steps)[method][equation]
    return _percent(errors) if errors else "not run"


def _percent(errors: Sequence[float], bold: str = "") -> str:
    middle, *ends = (
        f"{100 * error:.{2 + (error >= 0.995)}g}"
        for error in (statistics.median(errors), min(errors), max(errors))
    )
    middle = bold + middle + bold
    return _with_range(middle, *ends) if len(errors) > 1 else middle


def physics_table(
    file: str = "physics",
    methods: Sequence[str] = PHYSICS,
    equations: Sequence[str] | None = None,
    extras: str = "",
    times: str | None = None,
) -> str:
    """Median error in percent, smallest to largest, by equation and method; lowest median bold.

    Without ``equations``, those on which all methods were run. The mean rank is over these. With
    ``times``, a file of times of a step, these come last.
    """
    errors = physics(file, methods, extras)
    if equations is None:
        equations = [
            name for name in errors[methods[0]] if all(each[name] for each in errors.values())
        ]
    rows = [["equation", *methods], ["---", *["---:"] * len(methods)]]
    ratios: dict[str, list[float]] = {method: [] for method in methods}
    ranks: dict[str, list[int]] = {method: [] for method in methods}
    level: dict[str, int] = dict.fromkeys(methods, 0)
    for equation in equations:
        runs = {method: errors[method][equation] for method in methods}
        medians = {method: statistics.median(each) for method, each in runs.items() if each}
        lowest, cells = min(medians.values()), []
        if len(medians) == len(methods):
            best = max(max(runs[method]) for method in methods if medians[method] == lowest)
            for method, middle in medians.items():
                ranks[method].append(1 + sum(other < middle for other in medians.values()))
                level[method] += min(runs[method]) <= best
        for method, found in runs.items():
            if not found:
                cells.append("not run")
                continue
            cells.append(_percent(found, bold="**" * (medians[method] == lowest)))
            ratios[method].append(medians[method] / lowest)
        rows.append([equation, *cells])
    failed = [
        sum(error > FAILED for equation in equations for error in each[equation])
        for each in errors.values()
    ]
    rows.append(["failed", *map(str, failed)])
    rows.append(["worst over best", *(f"{max(each):.1f}" for each in ratios.values())])
    if any(ranks.values()):
        rows.append(["mean rank", *(f"{statistics.mean(each):.1f}" for each in ranks.values())])
        count = len(ranks[methods[0]])
        rows.append(["lowest or level", *(f"{each} of {count}" for each in level.values())])
    if times is not None:
        column = "over the summed loss"
        rows.append(["time of a step", *(figure(times, column, method=name) for name in methods)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def kinds() -> dict[str, dict[str, list[dict[str, str]]]]:
    """The runs in ``docs/kinds.csv``: by kind of problem, then by method."""
    runs: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    with (DOCS / "kinds.csv").open() as lines:
        for run in csv.DictReader(lines):
            runs[run["kind"]][run["method"]].append(run)
    return runs


def median(runs: Sequence[dict[str, str]], column: str = "score") -> float:
    """Over the runs of one method on one kind of problem."""
    return statistics.median(float(run[column]) for run in runs)


def _scores(runs: Sequence[dict[str, str]]) -> list[str]:
    scores = [float(run["score"]) for run in runs]
    return [f"{score:.3g}" for score in (statistics.median(scores), min(scores), max(scores))]


def kinds_score(kind: str, method: str) -> str:
    """The score of a method that has no column in `kinds_table`: median and range."""
    return "{} ({} to {})".format(*_scores(kinds()[kind][method]))


def kinds_table(sums: bool = False) -> str:
    """Median score, smallest to largest, by kind of problem and method; best median bold.

    ``sums``: of the methods with a given factor, with the gradients' cosines and norms.
    """
    columns = SUMS if sums else COMPARED
    seen = {"cosine": "cosine", "ratio": "norms"} if sums else {}
    header = ["kind", *([] if sums else ["measure"]), *columns.values(), *seen.values()]
    rows = [header, ["---" if name in ("kind", "measure") else "---:" for name in header]]
    for methods in kinds().values():
        summed = methods["sum x 1"]
        better = max if summed[0]["better"] == "higher" else min
        best = better(median(runs) for name, runs in methods.items() if name in KINDS)
        cells = [summed[0]["title"]]
        if not sums:
            cells.append(f"{summed[0]['measure']} ({summed[0]['better']} is better)")
        for name in columns:
            if not methods[name]:
                cells.append("")
                continue
            middle, *ends = _scores(methods[name])
            bold = "**" * (median(methods[name]) == best)
            cells.append(_with_range(bold + middle + bold, *ends))
        cells += [f"{median(summed, name):.2g}" for name in seen]
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def kinds_short_table() -> str:
    """The README's: medians of the tuned sum, of `gdmam`, and of the best method but those two."""
    lines = ["| kind of problem | measured | sum, tuned | `gdmam(rate)` | best of the others |"]
    lines.append("| --- | --- | ---: | ---: | --- |")
    for methods in kinds().values():
        first = methods["sum tuned"][0]
        better = max if first["better"] == "higher" else min
        medians = {name: median(runs) for name, runs in methods.items()}
        others = [name for name in medians if not name.startswith("gdmam") and name != "sum tuned"]
        best = better(others, key=medians.__getitem__)
        bold = "**" * (medians["gdmam 1"] == better(medians.values()))
        lines.append(
            f"| {first['title']} | {first['measure']}, {first['better']} is better | "
            f"{medians['sum tuned']:.3g} | {bold}{medians['gdmam 1']:.3g}{bold} | "
            f"{medians[best]:.3g} ({COMPARED.get(best, best)}) |"
        )
    return "\n".join(lines)


def _kld(text: str) -> str:
    return f"{float(text):.4f}" if float(text) < 0.1 else f"{float(text):.3f}"


def label_distributions_table() -> str:
    """Test KLD in ``docs/ldl_results_natural.csv`` by set and method, mean ranks, wins, losses."""
    sets = defaultdict(list)
    with (DOCS / "ldl_results_natural.csv").open() as lines:
        for run in csv.DictReader(lines):
            sets[run["data"]].append(run)
    judged = [runs for runs in sets.values() if runs[0]["verdict"] == "1"]
    labels = [run["label"] for run in judged[0]]
    rows = [["set", *labels, "no features"], ["---", *["---:"] * (len(labels) + 1)]]
    # The sets of the verdict first.
    for name, runs in sorted(sets.items(), key=lambda item: item[1] not in judged):
        cells = [name if runs in judged else f"({name})"]
        for run in runs:
            bold = "**" * (run["rank"] == "1")
            cells.append(bold + _kld(run["kld"]) + bold + "\\*" * _differs(run))
        rows.append([*cells, _kld(runs[0]["kld without features"])])
    columns = list(zip(*judged, strict=True))  # of a method each
    for title, part in ("mean rank", slice(None)), ("odd sets", ODD), ("even sets", EVEN):
        ranks = [statistics.mean(float(run["rank"]) for run in runs[part]) for runs in columns]
        rows.append([title, *(f"{rank:.1f}" for rank in ranks), ""])
    reference = next(runs for runs in columns if runs[0]["method"] == "rda")
    counts = []
    for runs in columns:
        lower = [
            float(run["kld"]) < float(other["kld"])
            for run, other in zip(runs, reference, strict=True)
            if _differs(run)
        ]
        counts.append(f"{lower.count(True)}, {lower.count(False)}" * (runs != reference))
    rows.append(["better, worse than RDA", *counts, ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _differs(run: dict[str, str]) -> bool:
    return float(run["p against rda"]) < 0.05


def defaults_table(*columns: str) -> str:
    """What each candidate for the default came to, best first."""
    lines = [f"| candidate | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for each in read("defaults")["rows"]:
        cells = [f"{each[column]:.3g}" for column in columns]
        lines.append(f"| {each['candidate']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def absent_table() -> str:
    """The prediction's test loss beside a task that is often without labels, by weighting."""
    columns = ("hidden", "said", "said / hidden")
    lines = ["| weighting | hidden | said | said over hidden |", "| --- |" + " ---: |" * 3]
    rows = read("absent")["rows"]
    for each in sorted(rows, key=lambda each: float(each["said / hidden"].split()[0])):
        cells = (_with_range(*re.findall(r"[\d.e-]+", each[column])) for column in columns)
        lines.append(f"| `{each['weighting']}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def delta_table() -> str:
    """The relative change to single tasks, by method, and by problem and library."""
    found: dict[str, dict[tuple[str, str], str]] = defaultdict(dict)
    for each in read("delta")["rows"]:
        where = each["problem"], each["library"]
        found[each["method"]][where] = _with_range(*re.findall(r"-?[\d.]+", each["delta m, %"]))
    columns = sorted({where for cells in found.values() for where in cells})
    rows = [
        ["method", *(f"{problem}, {library}" for problem, library in columns)],
        ["---", *["---:"] * len(columns)],
        *([name, *(cells.get(where, "") for where in columns)] for name, cells in found.items()),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def weighting(name: str) -> str:
    """Cells of ``docs/figures/weightings.json``: the medians of one weighting."""
    found = row("weightings", weighting=name)
    columns = ("burgers", "reaction", "SCUT_FBP", "digits")
    return " | ".join(found[column].split(" ")[0] for column in columns)


def weightings_table(*names: str) -> str:
    """Medians and ranges of some weightings, all problems."""
    rows = [row("weightings", weighting=name) for name in names]
    problems = [column for column in rows[0] if column != "weighting"]
    lines = [["weighting", *problems], ["---", *["---:"] * len(problems)]]
    for each in rows:
        cells = (_with_range(*re.findall(r"[\d.]+", each[name])) for name in problems)
        lines.append([f"`{each['weighting']}`", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@functools.cache
def docstrings() -> dict[str, str]:
    """The first paragraph of every docstring in the package's private modules, by name."""
    found = {}
    for path in Path(gdmam_jax.__file__).parent.glob("_*.py"):
        body = ast.parse(path.read_text()).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name] = ast.get_docstring(node)
            elif isinstance(node, ast.Assign) and isinstance(following, ast.Expr):
                found[node.targets[0].id] = following.value.value
    return {name: text.split("\n\n")[0] for name, text in found.items() if text}


def group(*names: str, level: int = 3) -> str:
    """A table of public names, a line each, and then the documentation of each.

    Their headings are of a level.
    """
    texts = docstrings()
    lines = ["| name | what |", "| --- | --- |"]
    for name in names:
        text = " ".join(texts[name].split()).replace("|", "\\|")
        lines.append(f"| [`{name}`][gdmam_jax.{name}] | {text} |")
    options = f"    options:\n      heading_level: {level}\n"
    return "\n".join([*lines, "", *(f"::: gdmam_jax.{name}\n{options}" for name in names)])


def api_table() -> str:
    """The pages of the API, and the names on each."""
    lines = ["| page | names |", "| --- | --- |"]
    for page in API:
        text = (DOCS / "api" / f"{page}.md").read_text()
        title = re.search(r"^# (.+)$", text, re.MULTILINE)[1]
        names = [
            f"[`{name}`][gdmam_jax.{name}]"
            for name in re.findall(r'^    "(\w+)",$', text, re.MULTILINE)
        ]
        names += [f"`{name}`" for name in re.findall(r"^::: (gdmam_jax\.\w+)$", text, re.MULTILINE)]
        lines.append(f"| [{title}]({page}.md) | {', '.join(names)} |")
    return "\n".join(lines)


def define_env(env: Any) -> None:
    """Gives the pages the functions above."""
    for function in (
        absent_table,
        api_table,
        delta_table,
        defaults_table,
        figure,
        group,
        kinds_score,
        kinds_table,
        label_distributions_table,
        measured,
        physics_error,
        physics_table,
        weighting,
        weightings_table,
    ):
        env.macro(function)
