"""Measuring in turn, and reporting in a table on screen and a JSON file.

Nothing here is reported as a time alone. All cases of a benchmark run one after the other, round
after round, so that whatever else the machine does falls on all of them. A figure is the median
over the rounds of the ratio of two cases in the same round, with its quartiles.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gdmam_jax.ldl.laboratory.training import processors


@dataclass
class Case:
    """One thing to measure.

    Attributes:
      name: in the table.
      run: does it once and waits for the result.
      first: seconds that tracing, compilation and the first call took.
      seconds: of every round.
    """

    name: str
    run: Callable[[], Any]
    first: float = float("nan")
    seconds: tuple[float, ...] = ()

    @property
    def milliseconds(self) -> float:
        """The median round."""
        return 1e3 * float(np.median(self.seconds))


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one case's time over another's, and its quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} - {self.high:.2f})"


def ratio(case: Case, base: Case, scale: float = 1.0) -> Ratio:
    """How many times `base` fits into `case`, round by round, times `scale`."""
    quotients = scale * np.array(case.seconds) / np.array(base.seconds)
    low, median, high = np.percentile(quotients, (25, 50, 75))
    return Ratio(float(median), float(low), float(high))


def tracked(stage: str, items: Sequence[Any]) -> Iterator[Any]:
    """The items one by one, with a bar on stderr that is drawn between them, not during them."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task(stage, total=len(items))
        for item in items:
            progress.refresh()
            yield item
            progress.advance(task)


def spread(numbers: Any) -> str:
    """The median, the lowest and the highest, to three digits."""
    low, middle, high = (f"{quantile:.3g}" for quantile in np.quantile(numbers, (0, 0.5, 1)))
    return f"{middle} ({low} to {high})"


def measure_in_turn(cases: Sequence[Case], rounds: int, warmup: int = 2) -> None:
    """Fill in `seconds` of all cases, and `first` where a case has not recorded it itself."""
    for case in tracked("first calls", cases):
        start = time.perf_counter()
        case.run()
        if np.isnan(case.first):
            case.first = time.perf_counter() - start
    times = [[] for _ in cases]
    for number in tracked("rounds", range(warmup + rounds)):
        for case, collected in zip(cases, times, strict=True):
            start = time.perf_counter()
            case.run()
            if number >= warmup:
                collected.append(time.perf_counter() - start)
    for case, collected in zip(cases, times, strict=True):
        case.seconds = tuple(collected)


def use_threads(threads: int | None) -> None:
    """Let this process use so many processors. Call it before JAX starts its threads."""
    if threads is not None:
        available = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, available[:threads])


def environment() -> dict[str, Any]:
    """Versions, device, and how busy the machine was."""
    names = ("jax", "jaxlib", "optax", "flax", "torch", "torchjd", "libmtl")
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    device = jax.devices()[0]
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: found[name] for name in names if name in found},
        "device": device.device_kind,
        "platform": device.platform,
        "processor": _processor(),
        "processors": processors(),
        "load": os.getloadavg()[0],
        "flags": os.environ.get("XLA_FLAGS", ""),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def report(title: str, rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Print rows as a table, and write them with the environment to a JSON file."""
    about = environment()
    table = Table(title=title, caption=f"{about['command']}; load {about['load']:.1f}")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console = Console()
    console.width = max(console.width, 140)
    console.print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(about | {"title": title, "rows": rows}, default=asdict))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if np.isnan(value) else f"{value:.3g}"
    return str(value)
