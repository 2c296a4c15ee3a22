"""The passes and exports of a run: how each ended, what it took, what it left on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.core.records import PlannedFigures
from flcompress.reporting.reading import RunRecord
from flcompress.wording import duration, elapsed, ratio, share, size

AGAINST_PLAN = ("on", "planned memory", "measured", "ratio", "planned time", "measured", "ratio")
"""Columns of the table of plan and measurement, behind the name of the pass."""

AGAINST_PLAN_NOTE = (
    "Memory: on a GPU the peak of its tensors; on a CPU that of the whole process, with what earlier passes left in "
    "it, which decides for small models. Planned time: of the counted FLOPs alone, those of held-out evaluations "
    "included; measured: with loading, pictures, checkpoints and all attempts."
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A pass or export of the latest attempt, from the journal; time and memory are of all its attempts."""

    event: str
    name: str
    status: str
    seconds: float | None
    peak_rss_mb: float | None
    peak_gpu_mb: float | None = None
    peak_gpu_reserved_mb: float | None = None
    clips_per_second: float | None = None
    utilisation: float | None = None
    planned: PlannedFigures | None = None
    attempts: int = 1
    arguments: str = ""  # of a failed step: the error

    @property
    def memory(self) -> str:
        """Peaks of memory: of the process, and of its GPU where it has one, with what torch reserved there."""
        host = "" if self.peak_rss_mb is None else size(self.peak_rss_mb * 1e6)
        if self.peak_gpu_mb is None or self.peak_gpu_reserved_mb is None:
            return host
        return f"{host}, GPU {size(self.peak_gpu_mb * 1e6)} ({size(self.peak_gpu_reserved_mb * 1e6)} reserved)"

    @property
    def time(self) -> str:
        """The time of all attempts and, where it trains, clips a second and the model FLOP utilisation of its GPUs."""
        rate = "" if self.clips_per_second is None else f", {self.clips_per_second:.3g} clips/s"
        rate += "" if self.utilisation is None else f", {share(self.utilisation)} of the stated FLOP/s"
        return "" if self.seconds is None else f"{elapsed(self.seconds, self.attempts)}{rate}"

    def against_plan(self) -> list[str]:
        """Cells of the table of plan and measurement, behind the name: memory and time, each with its ratio."""
        plan = self.planned
        if plan is None:
            return []
        peak = self.peak_gpu_mb if plan.gpu else self.peak_rss_mb
        memory = _compared(plan.memory, None if peak is None else peak * 1e6, size)
        return ["GPU" if plan.gpu else "CPU", *memory, *_compared(plan.seconds, self.seconds, duration)]


def _compared(planned: float | None, measured: float | None, text: Callable[[float], str]) -> list[str]:
    """Return planned, measured, and measured over planned; empty where there is none."""
    ratio_of = "" if not planned or measured is None else ratio(measured / planned)
    return ["" if value is None else text(value) for value in (planned, measured)] + [ratio_of]


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export: its size on disk (None where the folder is gone) and the scalars of its summary."""

    name: str
    folder: Path
    octets: int | None
    summary: dict[str, str]


def steps(run: RunRecord) -> list[Step]:
    """Passes and exports of the latest attempt in order; the stored entries where there is no journal."""
    arguments = {entry.key: entry.arguments for entry in run.entries}
    plans = {event.key: event.planned for event in run.journal if event.planned is not None}
    rows = [
        Step(
            event=event.event,
            name=event.name,
            status=event.status,
            seconds=event.seconds,
            peak_rss_mb=event.peak_rss_mb,
            peak_gpu_mb=event.peak_gpu_mb,
            peak_gpu_reserved_mb=event.peak_gpu_reserved_mb,
            clips_per_second=event.clips_per_second,
            utilisation=event.utilisation,
            planned=plans.get(event.key) if event.event == "pass" else None,
            attempts=event.attempts,
            arguments=arguments.get(event.key, "") or event.error,
        )
        for event in run.latest
        if event.event in ("pass", "export", "failed")
    ]
    return rows or [
        Step(
            event="pass",
            name=entry.name,
            status="stored",
            seconds=entry.seconds,
            peak_rss_mb=entry.peak_rss_mb,
            attempts=entry.attempts,
            arguments=entry.arguments,
        )
        for entry in run.entries[1:]
    ]


def exports(run: RunRecord) -> list[Export]:
    """Every export with its size on disk."""
    rows: list[Export] = []
    for name, summary in run.exports.items():
        folder = run.path / "exports" / name
        octets = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else None
        rows.append(Export(name=name, folder=folder, octets=octets, summary=flatten(summary.dump())))
    return rows


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the scalars of a JSON object by dotted name; long lists are counted instead of shown."""
    scalars: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            scalars |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            short = len(value) <= 6 and not any(isinstance(item, dict | list) for item in value)
            scalars[prefix + key] = ", ".join(_scalar(item) for item in value) if short else f"{len(value)} entries"
        elif value is not None and key != "key":
            scalars[prefix + key] = _scalar(value)
    return scalars


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
