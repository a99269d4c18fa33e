"""Options that the benchmarks' command lines share, and how they are read."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Rounds = Annotated[int, typer.Option(help="How many times each case runs.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Processors to use (all).", min=1)]
Losses = Annotated[
    str, typer.Option(help="Numbers of losses, the prediction's included; comma-separated.")
]
Output = Annotated[Path | None, typer.Option(help="JSON file to write.")]


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    found = _floats(text, option)
    if not all(each >= least and each.is_integer() for each in found):
        raise typer.BadParameter(
            f"{option} must be whole numbers of at least {least}, got {text!r}"
        )
    return [int(each) for each in found]


def learning_rates(text: str, option: str) -> list[float]:
    found = _floats(text, option)
    if not all(0 < each < math.inf for each in found):
        raise typer.BadParameter(f"{option} must be finite and above 0, got {text!r}")
    return found


def _floats(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{option} must be numbers separated by commas, got {text!r}"
        ) from None


def loss_counts(text: str) -> list[int]:
    return numbers(text, "--losses", 2)


def known_names(text: str, known: list[str], *, optional: bool = False) -> list[str]:
    """The names in a text, at least one unless they are optional."""
    names = text.split(",") if text or not optional else []
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown name {name!r}; expected some of {', '.join(known)}")
    return names


def data_sets(text: str) -> list[str]:
    """Label distributions by name or file, perhaps none."""
    from gdmam_jax.ldl.data import REGISTRY  # imports JAX, whose threads are chosen first

    files = [name for name in text.split(",") if Path(name).is_file()]
    return known_names(text, ["films", *REGISTRY, *files], optional=True)


def known_name(text: str, option: str, known: list[str]) -> str:
    names = known_names(text, known)
    if len(names) != 1:
        raise typer.BadParameter(f"{option} takes one name, got {text!r}")
    return names[0]


def already_run(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a result made with these settings is there; other settings are refused."""
    if not path.exists():
        return False
    found = json.loads(path.read_text())["settings"]
    if found != settings:
        raise typer.BadParameter(
            f"{path} was made with other settings, {found}; give those again, or another --out"
        )
    return True
