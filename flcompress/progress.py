"""The display of long work: a bar with loss, rate and remaining time in a terminal, sparse lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

ProgressSink = Callable[[int, int, Mapping[str, float]], None]
"""Called with (done, total, values to show)."""

PLAIN_SECONDS = 30.0
"""Where there is no terminal, a long work says how far it is this often."""


class Display(Protocol):
    """Where the manager reports to."""

    def line(self, text: str) -> None:
        """Print a line."""

    def stage(self, title: str) -> AbstractContextManager[ProgressSink]:
        """Show the progress of one long work while the context lasts."""


def default_display() -> Display:
    """Bars on a terminal, lines elsewhere; both on standard error, so that standard output stays for results."""
    return BarDisplay() if sys.stderr.isatty() else LineDisplay()


class QuietDisplay:
    """Shows nothing."""

    def line(self, text: str) -> None:
        """Discard the line."""
        return

    @contextmanager
    def stage(self, title: str) -> Iterator[ProgressSink]:
        """Yield a sink that discards progress."""
        yield lambda done, total, values: None


class LineDisplay:
    """Plain lines on standard error."""

    def line(self, text: str) -> None:
        """Print the line."""
        print(text, file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str) -> Iterator[ProgressSink]:
        """Yield a sink that prints a line of progress every few seconds."""
        shown = time.monotonic()
        first: tuple[int, float] | None = None

        def sink(done: int, total: int, values: Mapping[str, float]) -> None:
            nonlocal shown, first
            now = time.monotonic()
            first = first or (done, now)  # a resumed work does not start at 0, nor the work with what prepares it
            if now - shown >= PLAIN_SECONDS:
                shown = now
                rate = (done - first[0]) / max(now - first[1], 1e-9)
                left = f", {rate:.2g}/s, {clock((total - done) / rate)} left" if rate > 0 else ""
                self.line(f"  {title}: {done}/{total}{left}{''.join(f', {item}' for item in _few(values))}")

        yield sink


class BarDisplay:
    """A progress bar on standard error."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def line(self, text: str) -> None:
        """Print the line above the progress bar."""
        self._console.print(text, markup=False)

    @contextmanager
    def stage(self, title: str) -> Iterator[ProgressSink]:
        """Yield a sink that draws a progress bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task(title, total=None, rate="", values="")

            def sink(done: int, total: int, values: Mapping[str, float]) -> None:
                speed = bars.tasks[0].speed
                rate = f"{speed:.2g}/s" if speed else ""
                bars.update(task, completed=done, total=total, rate=rate, values=", ".join(_few(values)))

            yield sink


def clock(seconds: float) -> str:
    """75 as "1:15"; 4000 as "1:06:40"."""
    total = round(seconds)
    hours, minutes = total // 3600, total // 60 % 60
    return f"{hours}:{minutes:02d}:{total % 60:02d}" if hours else f"{minutes}:{total % 60:02d}"


SPEEDS = ("clips_per_second", "utilisation")


def _few(values: Mapping[str, float]) -> list[str]:
    """The losses, or else the first two values; and the speed, where it is known."""
    others = {name: value for name, value in values.items() if name not in SPEEDS}
    losses = {name: value for name, value in others.items() if name.endswith("loss")}
    chosen = losses or dict(list(others.items())[:2])
    chosen |= {name: values[name] for name in SPEEDS if name in values}
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in chosen.items()]
