"""Run exporters on the last program of a recipe; each result replaces the old one only when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flcompress.core.attempts import PEAKS, attempt, describe
from flcompress.core.program import Program
from flcompress.core.records import ExportFile
from flcompress.core.steps import Exporter
from flcompress.driver.clips import data_frame_rate
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import PreconditionError
from flcompress.files import key_of, move_in_place
from flcompress.frontend.recipe import arguments
from flcompress.progress import Display


def run_exports(
    run: RunDirectory, program: Program, exporters: Iterable[Exporter], display: Display, *, force: bool = False
) -> dict[str, dict[str, Any]]:
    """Write the exports that are not there yet; `force` writes all again.

    Returns:
        name -> the record of RUN/exports/<name>.json: the exporter's summary, key, seconds, peak_rss_mb,
        attempts; and status, "ran" or "cached".

    Raises:
        PreconditionError: an exporter reads the output of another that is not there.
    """
    run.exports.mkdir(exist_ok=True)
    program = replace(program, frame_rate=data_frame_rate(run.recipe()))
    records: dict[str, dict[str, Any]] = {}
    for exporter in exporters:
        missing = [name for name in exporter.after if not (run.exports / name).is_dir()]
        if missing:
            raise PreconditionError(
                f"{exporter.name}: reads {run.exports / missing[0]}, which is not there; export {missing[0]} first"
            )
        key = key_of(
            program=program.digest,
            name=exporter.name,
            version=exporter.version,
            arguments=arguments(exporter),
            fingerprint=exporter.fingerprint(),
            after=[_key(_recorded(run, name)) for name in exporter.after],
        )
        old = _recorded(run, exporter.name)
        if old is not None and old.key == key and (run.exports / exporter.name).is_dir() and not force:
            record = {**old.dump(), "status": "cached"}
            display.line(f"export {exporter.name}: unchanged")
        else:
            record = {**_export(run, program, exporter, key, display).dump(), "status": "ran"}
            display.line(f"export {exporter.name}: {describe(record)}")
        noted = {name: record[name] for name in ("status", "seconds", *PEAKS, "attempts", "key") if name in record}
        run.note("export", exporter.name, **noted)
        records[exporter.name] = record
    return records


def _export(run: RunDirectory, program: Program, exporter: Exporter, key: str, display: Display) -> ExportFile:
    work = run.exports / f".work-{exporter.name}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    tried = run.exports / f".attempts-{exporter.name}"  # next to the folder, which every attempt empties
    with attempt(tried, key) as attempts, display.stage(f"export {exporter.name}") as progress:
        summary = exporter.export(program, work, run.exports, progress)
    record = ExportFile(**{**summary, "key": key, **attempts.record()})
    # The record is removed first and written last: an interrupted export is repeated, never trusted.
    record_file(run, exporter.name).unlink(missing_ok=True)
    final, old = run.exports / exporter.name, run.exports / f".old-{exporter.name}"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    move_in_place(work, final)
    record.write(record_file(run, exporter.name))
    tried.unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
    return record


def record_file(run: RunDirectory, name: str) -> Path:
    """RUN/exports/<name>.json."""
    return run.exports / f"{name}.json"


def _recorded(run: RunDirectory, name: str) -> ExportFile | None:
    return ExportFile.read_optional(record_file(run, name))


def _key(record: ExportFile | None) -> str | None:
    """Return the key of an export; None for one of before keys were noted."""
    return None if record is None else record.dump().get("key")
