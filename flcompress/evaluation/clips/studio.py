"""Make the clips of an evaluation that are not there yet, process by process, and say what that takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flcompress import wording
from flcompress.core.records import BenchFile, ClipLine
from flcompress.distributed.world import World
from flcompress.evaluation.clips.samplers import Maker
from flcompress.files import key_of
from flcompress.progress import Display
from flcompress.runtime.clip_folder import ClipFolder, Item, clip_name

VERSION = 1
"""Part of the name of a contender's folder, to be raised when the same weights would give other clips."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """A clip that is wanted of every contender."""

    item: Item
    seed: int
    number: int

    @property
    def file(self) -> str:
        """Name of its file in a contender's folder."""
        return clip_name(self.item.prompt, self.item.key, self.seed, self.number)


class Studio:
    """The clip files of a run's evaluations, which every suite reads.

    Args:
        folder: `RUN/eval/clips`.
        takes: the clips that are wanted of every contender.
        world: the processes that share them.
        display: where progress is shown.
    """

    def __init__(self, folder: Path, takes: Sequence[Take], world: World, display: Display) -> None:
        self._folder, self._takes, self._world, self._display = folder, takes, world, display

    @cached_property
    def _names(self) -> list[str]:
        return [take.file for take in self._takes]

    def folder_of(self, maker: Maker) -> Path:
        """Return the folder of a contender's clips; other weights or another way to sample have another."""
        return self._folder / f"{maker.name}-{key_of(version=VERSION, identity=maker.identity)[:12]}"

    def make(self, makers: Sequence[Maker]) -> None:
        """Sample what is missing of this process's share; a killed call loses one clip."""
        missing = [self._missing(maker) for maker in makers]
        total = sum(len(takes) * maker.evaluations for maker, takes in zip(makers, missing, strict=True))
        if total:
            with self._display.stage("sampling") as progress:
                self._sample(makers, missing, _Total(total, progress, self._world))
        self._world.all_gather("sampled")

    def lines(self, maker: Maker) -> dict[str, ClipLine]:
        """Return file name -> its line of the manifest, of a contender's clips."""
        lines = ClipFolder(self.folder_of(maker)).lines()
        return {name: lines[name] for name in self._names}

    def _missing(self, maker: Maker) -> list[Take]:
        """Return this process's takes without an intact file; report files that changed or that are not ours."""
        folder = ClipFolder(self.folder_of(maker))
        known, intact = folder.lines(), folder.intact(self._names)
        lost = [name for name in self._names if name in known and name not in intact]
        if self._world.main and lost:
            self._display.line(
                f"{folder.folder}: {len(lost)} clips are missing or not as they were written ({lost[0]}); they are "
                "sampled again"
            )
        if self._world.main and (strangers := folder.strangers(self._names)):
            self._display.line(
                f"{folder.folder}: {len(strangers)} files that no evaluation wrote are ignored ({strangers[0]})"
            )
        mine = self._takes[self._world.rank :: self._world.size]
        return [take for take in mine if take.file not in intact]

    def _sample(self, makers: Sequence[Maker], missing: Sequence[Sequence[Take]], total: _Total) -> None:
        last: Maker | None = None
        for maker, takes in zip(makers, missing, strict=True):
            if not takes:
                continue
            if last is not None and last.home is not maker.home:
                last.release()
            last = maker
            maker.prepare([take.item for take in takes])
            folder = ClipFolder(self.folder_of(maker), self._world.rank)
            for take in takes:
                self._world.heartbeat(f"{maker.name}: {take.file}")
                began = time.monotonic()
                clip = maker.clip(take.item, take.seed, take.number, total.count)
                folder.add(
                    clip,
                    maker.frame_rate,
                    file=take.file,
                    item=take.item.key,
                    prompt=take.item.prompt,
                    image=None if take.item.image is None else str(take.item.image),
                    seed=take.seed,
                    number=take.number,
                    seconds=round(time.monotonic() - began, 3),
                    decoding_seconds=maker.decoding_seconds,
                )
                total.finish(maker.evaluations)
        if last is not None:
            last.release()

    def plan(self, makers: Sequence[Maker], bench: BenchFile | None) -> list[dict[str, Any]]:
        """Return what each contender takes: clips, those still missing, network evaluations, seconds if known."""
        rows = []
        for maker in makers:
            lines = ClipFolder(self.folder_of(maker)).intact(self._names)
            missing, seconds = len(self._names) - len(lines), _seconds_a_clip(maker, lines, bench)
            rows.append(
                {
                    "name": maker.name,
                    "label": maker.label,
                    "clips": len(self._names),
                    "missing": missing,
                    "evaluations": maker.evaluations * missing,
                    "seconds": 0.0 if not missing else None if seconds is None else missing * seconds,
                }
            )
        return rows


def plan_text(rows: Sequence[Mapping[str, Any]], run: Path) -> str:
    """Return a dry run's rows as a table, with the sum."""
    cells = [["contender", "clips", "to sample", "network calls", "time"]]
    for row in rows:
        shown = "not known" if row["seconds"] is None else wording.duration(row["seconds"])
        cells.append([row["name"], f"{row['clips']:,}", f"{row['missing']:,}", f"{row['evaluations']:,}", shown])
    known = [row["seconds"] for row in rows]
    whole = "not known" if None in known else wording.duration(sum(known))
    missing, calls = (sum(row[key] for row in rows) for key in ("missing", "evaluations"))
    cells.append(["all", "", f"{missing:,}", f"{calls:,}", whole])
    lines = wording.table(cells)
    if None in known:
        lines.append(f"Times are known after flcompress bench {run}, and of what has sampled a clip.")
    lines.append("On one device; several processes share the clips (torchrun).")
    return "\n".join(lines)


class _Total:
    """Progress in network evaluations over all clips; a pipeline that reports none counts when its clip is done."""

    def __init__(self, total: int, progress: Any, world: World) -> None:
        self._total, self._progress, self._world = total, progress, world
        self._before = 0

    def count(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self._progress(self._before + done, self._total, values)
        self._world.heartbeat()

    def finish(self, evaluations: int) -> None:
        self._before += evaluations


def _seconds_a_clip(maker: Maker, lines: Mapping[str, ClipLine], bench: BenchFile | None) -> float | None:
    """Return what a clip takes by the clips there are, or else by the bench's teacher in proportion to the work."""
    measured = [line.seconds for line in lines.values() if line.seconds is not None]
    if measured:
        return sum(measured) / len(measured)
    if bench is None or bench.teacher is None or not maker.parameters:
        return None
    row = next((row for row in bench.rows if "eager" in row.backend and row.what == "denoising"), None)
    if row is None or bench.device != ("cuda" if torch.cuda.is_available() else "cpu"):
        return None
    work = maker.evaluations * maker.parameters / (bench.teacher.evaluations * bench.teacher.parameters)
    return row.teacher_seconds.median / bench.batch * work
