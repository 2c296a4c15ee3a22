"""One evaluation by clip files: prompts, the clips of every contender, measurements that are stored, and tables.

A suite says what is measured on a file and what the tables hold; see `FileSuite` and, for most of them, `ClipSuite`.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from flcompress.core.records import BenchFile, ClipLine, EvalFile, MeasuredLine, ScoreLine
from flcompress.core.suites import Suite, SuiteRequest
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.world import World
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.evaluation.clips.prompts import Material, read_material
from flcompress.evaluation.clips.samplers import Home, Maker, makers_of
from flcompress.evaluation.clips.stock import maker_against
from flcompress.evaluation.clips.studio import Studio, Take, plan_text
from flcompress.evaluation.suites.side_by_side import write_side_by_side
from flcompress.evaluation.suites.tables import Figure, Measurement, Sets
from flcompress.files import append_line, key_of, sha256
from flcompress.progress import Display, QuietDisplay
from flcompress.runtime.clip_folder import ClipFolder, Item, clip_name
from flcompress.runtime.torch_session import best_device

Rows = Mapping[str, Mapping[str, Any]]
"""Contender -> the facts of its row."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement of one clip file.

    Attributes:
        path: the file.
        line: its line of the manifest.
        part: what is measured on it; "" where a suite measures all at once.
        teacher: the teacher's file and line from the same noise; None of the teacher's own and of real clips.
    """

    path: Path
    line: ClipLine
    part: str = ""
    teacher: tuple[Path, ClipLine] | None = None


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a suite is given to work with.

    Attributes:
        request: what was asked for.
        run: the run.
        home: autoencoder, size and frame rate of its clips.
        world: the processes that share the work.
        device: where this process computes.
        folder: the suite's, `RUN/eval/SUITE`.
    """

    request: SuiteRequest
    run: RunDirectory
    home: Home
    world: World
    device: str
    folder: Path


class FileSuite(Suite):
    """A suite that judges clip files.

    Attributes:
        version: part of the key of measurements; raise it when the same clips would be measured otherwise.
        figures: the columns of its table.
        size: clips of a prompt for each seed, and seeds, where they are not the recipe's.
    """

    version: ClassVar[int] = 1
    figures: ClassVar[tuple[Figure, ...]]
    size: ClassVar[tuple[int, int] | None] = None

    def prepare(self, session: Session) -> dict[str, Any]:
        """Check, in the main process and before anything is sampled, that clips can be judged.

        Returns:
            What judges them, for `results.json`; empty where it is this version alone.
        """
        return {}

    def material(self, session: Session, frames: Path) -> Material:
        """Return the prompts; `frames` is a folder for first frames."""
        return read_material(session.request, session.run, session.home.program, session.device, frames)

    def parts(self, line: ClipLine, session: Session) -> Sequence[str]:
        """Return what is measured on a clip apart from the rest, each with a key of its own."""
        return ("",)

    @abstractmethod
    def key(self, task: Task, session: Session, judge: Mapping[str, Any]) -> str:
        """Return a hash of all that a measurement depends on, under which it is stored."""

    @abstractmethod
    def measurements(self, tasks: Mapping[str, Task], session: Session) -> Iterator[tuple[str, Measurement]]:
        """Yield (key, measurement) of these tasks; each is stored as it comes."""

    @abstractmethod
    def tables(self, sets: Sets, rows: Rows, session: Session) -> tuple[dict[str, Any], list[ScoreLine]]:
        """Return floor, contenders, paired, figures and warnings of `results.json`, and every clip's figures."""

    @override
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        run, device = RunDirectory(request.run, request.model), best_device()
        run.final().check()
        with (
            join("local", run.recipe().training.timeout, device, Launch.from_environment()) as world,
            world.propagating_failures(),
        ):
            display = request.display if world.main else QuietDisplay()
            folder = run.path / "eval" / self.name
            home = Home(run, device)
            session = Session(request=request, run=run, home=home, world=world, device=device, folder=folder)
            return _Evaluation(self, session, display).results()


class _Evaluation:
    """One evaluation by a suite."""

    def __init__(self, suite: FileSuite, session: Session, display: Display) -> None:
        self._suite, self._session, self._display = suite, session, display
        self._request, self._run, self._world = session.request, session.run, session.world
        self._home = session.home
        size = self._run.recipe().evaluation
        each, seeds = suite.size or (size.clips_per_prompt, size.seeds)
        self._seeds = self._request.seeds or seeds
        self._each = self._request.clips_per_prompt or each
        self._stages = size.stages if self._request.stages is None else self._request.stages
        self._clips = self._run.path / "eval" / "clips"
        self._material: Material | None = None
        self._judge: dict[str, Any] = {}

    def results(self) -> dict[str, Any]:
        if self._seeds < 2 or self._each < 1:
            raise RequestError(
                f"seeds: {self._seeds} and clips_per_prompt: {self._each} given, expected at least 2 and 1; the "
                "confidence interval comes from their spread"
            )
        self._judge = self._world.broadcast(lambda: self._suite.prepare(self._session))
        items = self._items()
        takes = [
            Take(item=item, seed=seed, number=number)
            for seed in range(self._seeds)
            for item in items
            for number in range(self._each)
        ]
        studio = Studio(self._clips, takes, self._world, self._display)
        request = self._request
        makers = makers_of(
            self._run, self._home, request.backends, request.guidances, request.frame_local, stages=self._stages
        )
        for path in self._request.against:
            makers.append(maker_against(path, self._home, [maker.name for maker in makers]))
        if self._request.dry_run:
            return self._plan(studio, makers, items)
        real_folder = Path(self._world.broadcast(lambda: str(self._write_real())))
        studio.make(makers)
        folders = {maker.name: studio.folder_of(maker) for maker in makers}
        tasks = {maker.name: self._tasks(studio, maker, makers[0]) for maker in makers}
        real = [Task(path=real_folder / line.file, line=line) for line in ClipFolder(real_folder).lines().values()]
        clips, real_clips, judging = self._measure(tasks, real)
        lines = {name: [task.line for task in each] for name, each in tasks.items()}
        sets = Sets(takes=takes, clips=clips, real=real_clips, lines=lines)
        seconds = {**_sampling_seconds([line for each in lines.values() for line in each]), "judging": judging}
        results: dict[str, Any] = self._world.broadcast(lambda: self._results(makers, sets, folders, seconds))
        return results

    def _items(self) -> tuple[Item, ...]:
        """Return the prompts, which the main process reads."""

        def read() -> list[list[str | None]]:
            self._material = self._suite.material(self._session, self._clips / "first-frames")
            return [[item.prompt, str(item.image) if item.image else None] for item in self._material.items]

        plain = self._world.broadcast(read)
        return tuple(Item(prompt=prompt, image=Path(image) if image else None) for prompt, image in plain)

    def _plan(self, studio: Studio, makers: Sequence[Maker], items: Sequence[Item]) -> dict[str, Any]:
        bench = BenchFile.read_optional(self._run.path / "bench" / "results.json")
        rows = studio.plan(makers, bench if bench is not None and bench.program == self._run.key else None)
        sizes = {"prompts": len(items), "seeds": self._seeds, "clips_per_prompt": self._each}
        return {"suite": self._suite.name, **sizes, "contenders": rows, "text": plan_text(rows, self._run.path)}

    def _write_real(self) -> Path:
        """Write the held-out real clips once, as what the autoencoder makes of them; return their folder."""
        material, home = self._material, self._home
        assert material is not None
        source = "moving-digits" if material.benchmark else str(material.data.folder) if material.data else None
        key = key_of(source=source, clips=len(material.data) if material.data else 0, **home.identity)
        folder = ClipFolder(self._clips / f"real-{key[:12]}")
        lines = folder.lines()
        if source is None or (lines and len(folder.intact(lines)) == len(lines) and self._complete(folder)):
            return folder.folder
        clips = material.real_clips(home.parts, home.program.latents)
        with self._display.stage("real clips") as progress:
            for number, (caption, clip) in enumerate(clips):
                item = Item(prompt=caption)
                name = clip_name(caption, item.key, 0, number)
                if name not in lines:
                    folder.add(clip, home.frame_rate, file=name, item=item.key, prompt=caption, seed=0, number=number)
                progress(number + 1, len(material.data or ()) or number + 1, {})
        folder.folder.mkdir(parents=True, exist_ok=True)
        (folder.folder / "complete").touch()
        home.parts.let_go()
        return folder.folder

    def _complete(self, folder: ClipFolder) -> bool:
        return (folder.folder / "complete").is_file()

    def _tasks(self, studio: Studio, maker: Maker, teacher: Maker) -> list[Task]:
        """Return a contender's clips, in the order of the takes, each next to its teacher's."""
        folder, theirs = studio.folder_of(maker), studio.folder_of(teacher)
        lines = studio.lines(teacher)
        return [
            Task(
                path=folder / file,
                line=line,
                teacher=None if maker is teacher else (theirs / file, lines[file]),
            )
            for file, line in studio.lines(maker).items()
        ]

    def _measure(
        self, clips: Mapping[str, Sequence[Task]], real: Sequence[Task]
    ) -> tuple[dict[str, list[Measurement]], list[Measurement], float]:
        """Measure this process's share of what is not measured yet.

        Returns:
            The measurements of the contenders and of the real clips, and the seconds of all of them.
        """
        keyed = {name: [self._keyed(task) for task in tasks] for name, tasks in clips.items()}
        keyed_real = [self._keyed(task) for task in real]
        work = {key: task for group in (*keyed.values(), keyed_real) for parts in group for key, task in parts.items()}
        stored = self._stored()
        mine = [key for key in list(work)[self._world.rank :: self._world.size] if key not in stored]
        if mine:
            target = self._session.folder / f"measured-{self._world.rank}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._display.stage("measuring") as progress:
                measurements = self._suite.measurements({key: work[key] for key in mine}, self._session)
                began = time.monotonic()
                for done, (key, measurement) in enumerate(measurements, start=1):
                    seconds, began = time.monotonic() - began, time.monotonic()
                    append_line(target, _line(key, measurement, seconds).line())
                    progress(done, len(mine), {})
            self._home.parts.let_go()
        self._world.all_gather("measured")
        stored = self._stored()

        def read(parts: Mapping[str, Task]) -> Measurement:
            lines = [stored[key] for key in parts]
            features = {name: np.asarray(vector) for line in lines for name, vector in line.features.items()}
            return Measurement(figures={k: v for line in lines for k, v in line.figures.items()}, features=features)

        seconds = sum(stored[key].seconds or 0.0 for key in work)
        contenders = {name: [read(parts) for parts in group] for name, group in keyed.items()}
        return contenders, [read(parts) for parts in keyed_real], seconds

    def _keyed(self, task: Task) -> dict[str, Task]:
        """Return key -> task of all that is measured on a clip."""
        parts = (
            Task(path=task.path, line=task.line, part=part, teacher=task.teacher)
            for part in self._suite.parts(task.line, self._session)
        )
        return {self._suite.key(part, self._session, self._judge): part for part in parts}

    def _stored(self) -> dict[str, MeasuredLine]:
        files = sorted(self._session.folder.glob("measured-*.jsonl"))
        return {line.key: line for file in files for line in MeasuredLine.read_lines(file)}

    def _results(
        self, makers: Sequence[Maker], sets: Sets, folders: Mapping[str, Path], seconds: Mapping[str, float]
    ) -> dict[str, Any]:
        rows = {maker.name: _row(maker, folders[maker.name].relative_to(self._run.path)) for maker in makers}
        takes = sets.takes
        plain, scores = self._suite.tables(sets, rows, self._session)
        results = {
            "program": self._run.key,
            "benchmark": self._suite.name,
            "clips": len(takes),
            "seeds": self._seeds,
            "prompts": len({take.item.key for take in takes}),
            "reference_clips": len(sets.real),
            **plain,
            "source": self._material.note if self._material else "",
            **({"judge": self._judge} if self._judge else {}),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        file, folder = EvalFile(**results), self._session.folder
        file.write(folder / "results.json")
        text = "".join(score.line() + "\n" for score in scores)
        (folder / "clips.jsonl").write_text(text, encoding="utf-8")
        if "student" in folders:
            write_side_by_side(folder / "side-by-side", takes, folders[makers[0].name], folders["student"], scores)
        for warning in results["warnings"]:
            self._display.line(warning)
        return file.dump()


def _sampling_seconds(lines: Sequence[ClipLine]) -> dict[str, float]:
    """Return the seconds of sampling and of decoding; decoding that is not known apart counts as sampling."""
    decoding = sum(line.decoding_seconds or 0.0 for line in lines)
    return {"sampling": sum(line.seconds or 0.0 for line in lines) - decoding, "decoding": decoding}


def hash_of_image(line: ClipLine) -> str | None:
    """Return the SHA-256 of the first frame that a clip was made from."""
    return sha256(Path(line.image)) if line.image else None


def _line(key: str, measurement: Measurement, seconds: float) -> MeasuredLine:
    features = {name: vector.tolist() for name, vector in measurement.features.items()}
    figures = dict(measurement.figures)
    return MeasuredLine(key=key, figures=figures, features=features, seconds=round(seconds, 3))


def _row(maker: Maker, folder: Path) -> dict[str, Any]:
    return {
        "name": maker.name,
        "label": maker.label,
        "steps": maker.steps,
        "guidance": maker.guidance,
        "evaluations": maker.evaluations,
        "parameters": maker.parameters,
        "folder": folder.as_posix(),
    }
