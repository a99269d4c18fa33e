"""Options that the benchmarks' command lines share, and how they are read."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Rounds = Annotated[int, typer.Option(help="How many times each case runs.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Processors to use (all).", min=1)]
Losses = Annotated[
    str, typer.Option(help="Numbers of losses, the prediction's included; comma-separated.")
]
Output = Annotated[Path | None, typer.Option(help="JSON file to write.")]


def numbers(text: str, kind: Callable[[float], Any] = int) -> list[Any]:
    try:
        return [kind(float(part)) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}") from None


def loss_counts(text: str) -> list[int]:
    counts = numbers(text)
    if min(counts) < 2:
        raise typer.BadParameter(f"--losses must be at least 2, got {text}")
    return counts


def known_names(text: str, known: list[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown name {name!r}; expected some of {', '.join(known)}")
    return names


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
