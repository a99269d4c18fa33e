"""Tables, pictures and one HTML page from an experiment's folder."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path

from gdmam_jax.ldl.laboratory import pictures, storage, tables
from gdmam_jax.ldl.laboratory.protocol import SELECTIONS
from gdmam_jax.ldl.laboratory.results import Experiment, load


def selections(names: Sequence[str] | None) -> list[str]:
    """The selections of these names, all if None.

    Raises:
      ValueError: an unknown one.

    Examples:
      >>> selections(["last"])
      ['last']
    """
    chosen = list(dict.fromkeys(SELECTIONS if names is None else names))
    if unknown := set(chosen) - set(SELECTIONS):
        raise ValueError(
            f"unknown selection {min(unknown)!r}; expected one of {', '.join(SELECTIONS)}"
        )
    return chosen


def write(
    folder: str | os.PathLike[str] | Experiment,
    *,
    tuning: str | None = None,
    selected: Sequence[str] | None = None,
) -> Path:
    """Write a report into an experiment's folder, from what was trained: nothing is trained again.

    Args:
      folder: what `experiment.run` wrote to, or what `results.load` found there.
      tuning: which held-out rows choose learning rate and setting, see `selection.rows`.
      selected: some of `protocol.SELECTIONS`; None is all. Pictures are of the first.

    Returns:
      The path of `report.html`. In the same folder are `runs.csv`, `table.md`, `table.tex`, and a
      PNG for every one of `pictures.PICTURES`.

    Raises:
      FileNotFoundError: there are no results.
      ValueError: an unknown selection or tuning.
    """
    names = selections(selected)
    experiment = folder if isinstance(folder, Experiment) else load(folder)
    home = Path(experiment.folder)
    with storage.naming(home):
        tables.write_csv(experiment, home / "runs.csv", names, tuning)
        for name, text in (("table.md", tables.markdown), ("table.tex", tables.latex)):
            comment = "%" if name.endswith("tex") else ""
            parts = [
                f"{comment} Selection: {SELECTIONS[s]}\n\n{text(experiment, s, tuning)}".lstrip()
                for s in names
            ]
            (home / name).write_text("\n".join(parts), encoding="utf-8")
        drawn = pictures.draw(experiment, home, names[0], tuning)
        page = home / "report.html"
        page.write_text(_page(experiment, names, tuning, drawn), encoding="utf-8")
    return page


def _page(
    experiment: Experiment, names: Sequence[str], tuning: str | None, drawn: dict[str, Path]
) -> str:
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8")
    )
    cells = {name: tables.table(experiment, name, tuning) for name in names}
    return template.render(
        facts=experiment.facts,
        selections=SELECTIONS,
        titles=[f"{tables.TITLES[m]} {tables.arrow(m)}" for m in tables.COLUMNS],
        tables={
            name: [
                (result.label, result.trial(name, tuning), cells[name][result.name], rank)
                for result, _, rank in tables.ranked(experiment, name, tuning)
            ]
            for name in names
        },
        notes={name: tables.unbeaten(experiment, name, tuning) for name in names},
        pictures={
            pictures.PICTURES[name]: base64.b64encode(path.read_bytes()).decode()
            for name, path in drawn.items()
        },
    )
