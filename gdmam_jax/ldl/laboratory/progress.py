"""How far an experiment has got: bars on a terminal, lines elsewhere, and the total time left."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Clock:
    """Estimates the time left over all methods from the epochs trained since the first report.

    Args:
      totals: epochs in all of every method, by label.
      chunk: most epochs trained between two calls; a larger step, and what a label's first call
        tells, is what was done before.
      now: a clock, in seconds.
    """

    def __init__(
        self, totals: Mapping[str, int], chunk: int, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.done: dict[str, int] = {}
        self._total = sum(totals.values())
        self._chunk, self._now, self._trained = chunk, now, 0
        self._start: float | None = None

    def __call__(self, label: str, done: int) -> str:
        """Take what `experiment.Progress` is told, and say the time left."""
        step = done - self.done.get(label, done)
        if 0 < step <= self._chunk:
            if self._start is None:  # the first step includes compiling: it does not count
                self._start = self._now()
            else:
                self._trained += step
        self.done[label] = done
        left = self._total - sum(self.done.values())
        if not left:
            return "nothing left"
        if self._start is None or not self._trained:
            return "time left unknown"
        seconds = (self._now() - self._start) / self._trained * left
        return f"{timedelta(seconds=round(seconds))} left"


@contextlib.contextmanager
def shown(
    console: Console, totals: Mapping[str, int], chunk: int, seconds: float = 10.0
) -> Iterator[Callable[[str, int, int], None]]:
    """Show progress while the context lasts.

    Args:
      console: where.
      totals: see `Clock`.
      chunk: see `Clock`.
      seconds: least time between two lines of a method, if the console is not a terminal.

    Yields:
      What `experiment.run` takes as `progress`.
    """
    clock = Clock(totals, chunk)
    if not console.is_terminal:
        printed = dict.fromkeys(totals, float("-inf"))

        def line(label: str, done: int, total: int) -> None:
            left = clock(label, done)
            if done == total or time.monotonic() - printed[label] >= seconds:
                printed[label] = time.monotonic()
                console.print(
                    f"{label}: {done} of {total} epochs; all methods: {left}", highlight=False
                )

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    last = TextColumn("epochs"), TimeElapsedColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, *last, console=console) as bars:
        tasks = {label: bars.add_task(label, total=None, left="") for label in totals}
        everything = bars.add_task("all methods", total=None, left="") if len(totals) > 1 else None

        def bar(label: str, done: int, total: int) -> None:
            left = clock(label, done)
            alone = everything is None
            bars.update(tasks[label], completed=done, total=total, left=left if alone else "")
            if everything is not None:
                whole = sum(totals.values())
                bars.update(everything, completed=sum(clock.done.values()), total=whole, left=left)

        yield bar
