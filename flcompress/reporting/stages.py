"""The passes and exports of a run: how each ended, what it took, what it left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flcompress.reporting.reading import RunRecord
from flcompress.reporting.record import Record


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass or export of the latest attempt, as the journal has it; time and memory are of all its attempts."""

    event: str
    name: str
    status: str
    seconds: float | None
    peak_rss_mb: float | None
    attempts: int = 1
    arguments: str = ""  # of a failed step: the error


@dataclass(frozen=True, kw_only=True)
class Export:
    """One export: its size on disk (None where the folder is gone) and the scalars of its summary."""

    name: str
    folder: Path
    octets: int | None
    summary: dict[str, str]


def steps(run: RunRecord) -> list[Step]:
    """Passes and exports of the latest attempt in order; the stored entries where there is no journal."""
    arguments = {entry.key: entry.arguments for entry in run.entries}
    found = [
        Step(
            event=event.text("event"),
            name=event.text("name") if event.has("name") else "",
            status=event.text("status") if event.has("status") else "",
            seconds=event.number("seconds") if event.has("seconds") else None,
            peak_rss_mb=event.number("peak_rss_mb") if event.has("peak_rss_mb") else None,
            attempts=int(event.number("attempts")) if event.has("attempts") else 1,
            arguments=arguments.get(str(event.values.get("key")), "") or str(event.values.get("error") or ""),
        )
        for event in run.latest
        if event.values.get("event") in ("pass", "export", "failed")
    ]
    return found or [
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
    found: list[Export] = []
    for name, summary in run.exports.items():
        folder = run.path / "exports" / name
        octets = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else None
        found.append(Export(name=name, folder=folder, octets=octets, summary=flatten(summary)))
    return found


def flatten(record: Record, prefix: str = "") -> dict[str, str]:
    """The scalars of a record by dotted name; long lists are counted instead of shown."""
    found: dict[str, str] = {}
    for key, value in record.values.items():
        if isinstance(value, dict):
            found |= flatten(Record(record.file, value), f"{prefix}{key}.")
        elif isinstance(value, list):
            short = len(value) <= 6 and not any(isinstance(item, dict | list) for item in value)
            found[prefix + key] = ", ".join(_scalar(item) for item in value) if short else f"{len(value)} entries"
        elif value is not None and key != "key":
            found[prefix + key] = _scalar(value)
    return found


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
