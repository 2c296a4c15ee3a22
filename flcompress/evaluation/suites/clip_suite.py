"""What every suite of clip files shares: it asks the studio for the clips, measures each once, and makes the tables.

A suite says what it measures on a clip (`measure`), and what of that it reports of a clip, a prompt and a set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from flcompress.core.records import BenchFile, ClipLine, EvalFile, MeasuredLine
from flcompress.core.suites import Suite, SuiteRequest
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.world import World
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.evaluation.clips.files import ClipFolder, Item, clip_name, read_frames
from flcompress.evaluation.clips.prompts import Material, read_material
from flcompress.evaluation.clips.samplers import Home, Maker, makers_of
from flcompress.evaluation.clips.stock import maker_against
from flcompress.evaluation.clips.studio import Studio, Take, plan_text
from flcompress.evaluation.suites.side_by_side import write_side_by_side
from flcompress.evaluation.suites.tables import Figure, Measurement, Sets, tables
from flcompress.files import append_line, key_of, sha256
from flcompress.progress import Display, QuietDisplay
from flcompress.runtime.clip_files import Frames, pixels_of, read_picture
from flcompress.runtime.sizes import sizes_of
from flcompress.runtime.torch_session import best_device

Latents = Callable[[Frames], torch.Tensor]
"""Frames -> their latents [1, channels, frames, height, width] by the run's own autoencoder."""


@dataclass(frozen=True, kw_only=True)
class ClipContext:
    """What a clip is measured against.

    Attributes:
        frame_rate: frames a second of the clip.
        encode: gives the latents of frames.
        image: the first frame that it was made from, at its size [height, width, 3]; None if there is none.
        teacher: the teacher's clip from the same noise; None of the teacher's own and of real clips.
    """

    frame_rate: float
    encode: Latents
    image: Frames | None = None
    teacher: Frames | None = None


class ClipSuite(Suite):
    """A suite that judges clip files.

    Attributes:
        version: part of the key of measurements; raise it when the same clips would be measured otherwise.
        figures: the columns of its table.
    """

    version: ClassVar[int] = 1
    figures: ClassVar[tuple[Figure, ...]]

    @abstractmethod
    def measure(self, frames: Frames, context: ClipContext) -> Measurement:
        """Return the measurement of one clip; it is stored, so it must depend on the arguments alone."""

    def of_clip(self, clip: Measurement, real: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of one clip, given the real clips' measurements."""
        return clip.figures

    def of_prompt(self, clips: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of all clips of one prompt together."""
        return {}

    def of_set(self, clips: Sequence[Measurement], real: Sequence[Measurement]) -> Mapping[str, float]:
        """Return the figures of all clips of one seed together, against real clips."""
        return {}

    def warnings(self, figures: Mapping[str, Mapping[str, float]], surely_higher: Mapping[str, bool]) -> list[str]:
        """Return lines that a person should read first.

        Args:
            figures: contender -> figure -> mean; the teacher comes first.
            surely_higher: figure -> whether the student's is higher than the teacher's beyond the paired interval.
        """
        return []

    @override
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        run, device = RunDirectory(request.run, request.model), best_device()
        run.final().check()
        with (
            join("local", run.recipe().training.timeout, device, Launch.from_environment()) as world,
            world.propagating_failures(),
        ):
            display = request.display if world.main else QuietDisplay()
            return _Evaluation(self, request, run, world, display, device).results()


class _Evaluation:
    """One evaluation by a clip suite."""

    def __init__(
        self, suite: ClipSuite, request: SuiteRequest, run: RunDirectory, world: World, display: Display, device: str
    ) -> None:
        self._suite, self._request, self._run, self._world = suite, request, run, world
        self._display, self._device = display, device
        size = run.recipe().evaluation
        self._seeds = request.seeds or size.seeds
        self._each = request.clips_per_prompt or size.clips_per_prompt
        self._folder = run.path / "eval"
        self._home = Home(run, device)
        self._material: Material | None = None

    def results(self) -> dict[str, Any]:
        if self._seeds < 2 or self._each < 1:
            raise RequestError(
                f"seeds: {self._seeds} and clips_per_prompt: {self._each} given, expected at least 2 and 1; the "
                "confidence interval comes from their spread"
            )
        items = self._items()
        takes = [
            Take(item=item, seed=seed, number=number)
            for seed in range(self._seeds)
            for item in items
            for number in range(self._each)
        ]
        studio = Studio(self._folder / "clips", takes, self._world, self._display)
        makers = makers_of(self._run, self._home, self._request.backends)
        for path in self._request.against:
            makers.append(maker_against(path, self._home, [maker.name for maker in makers]))
        if self._request.dry_run:
            return self._plan(studio, makers, items)
        real_folder = Path(self._world.broadcast(lambda: str(self._write_real())))
        studio.make(makers)
        real = list(ClipFolder(real_folder).lines().values())
        clips = {maker.name: studio.lines(maker) for maker in makers}
        folders = {maker.name: studio.folder_of(maker) for maker in makers}
        measured = self._measure(clips, folders, real_folder, real)
        results: dict[str, Any] = self._world.broadcast(lambda: self._tables(makers, takes, measured, folders, real))
        return results

    def _items(self) -> tuple[Item, ...]:
        """Return the prompts, which the main process reads."""

        def read() -> list[list[str | None]]:
            frames = self._folder / "clips" / "first-frames"
            program = self._home.program
            self._material = read_material(self._request, self._run, program, self._device, frames)
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
        folder = ClipFolder(self._folder / "clips" / f"real-{key[:12]}")
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

    def _measure(
        self,
        clips: Mapping[str, Mapping[str, ClipLine]],
        folders: Mapping[str, Path],
        real_folder: Path,
        real: Sequence[ClipLine],
    ) -> dict[str, MeasuredLine]:
        """Measure this process's share of what is not measured yet; return file SHA-256 key -> measurement."""
        first = next(iter(clips))
        work: dict[str, tuple[Path, ClipLine, Path | None]] = {}
        for name, lines in clips.items():
            for file, line in lines.items():
                teacher = folders[first] / file if name != first else None
                work[self._key(line, clips[first][file] if teacher else None)] = (folders[name] / file, line, teacher)
        work |= {self._key(line, None): (real_folder / line.file, line, None) for line in real}
        stored = self._stored()
        mine = [key for key in list(work)[self._world.rank :: self._world.size] if key not in stored]
        target = self._results_folder / f"measured-{self._world.rank}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        if mine:
            with self._display.stage("measuring") as progress:
                for done, key in enumerate(mine, start=1):
                    self._world.heartbeat(f"measuring {work[key][0].name}")
                    append_line(target, self._measured(key, *work[key]).line())
                    progress(done, len(mine), {})
            self._home.parts.let_go()
        self._world.all_gather("measured")
        stored = self._stored()
        return {key: stored[key] for key in work}

    def _measured(self, key: str, path: Path, line: ClipLine, teacher: Path | None) -> MeasuredLine:
        frames = read_frames(path)
        image = None
        if line.image is not None:
            image = pixels_of(read_picture(Path(line.image), *frames.shape[1:3])[:, None])[0]
        context = ClipContext(
            frame_rate=line.frame_rate,
            encode=self._encode,
            image=image,
            teacher=read_frames(teacher) if teacher is not None else None,
        )
        measurement = self._suite.measure(frames, context)
        features = {name: vector.tolist() for name, vector in measurement.features.items()}
        return MeasuredLine(key=key, figures=dict(measurement.figures), features=features)

    def _encode(self, frames: Frames) -> torch.Tensor:
        """Return the latents of frames, cut to a size that the model takes."""
        grid = sizes_of(self._home.program)
        length, height, width = grid.fit_frames(len(frames)), *map(grid.fit_pixels, frames.shape[1:3])
        cut = torch.from_numpy(np.ascontiguousarray(frames[:length, :height, :width]))
        return self._home.parts.encode_clips(cut.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).float().cpu()

    def _key(self, line: ClipLine, teacher: ClipLine | None) -> str:
        return key_of(
            suite=self._suite.name,
            version=self._suite.version,
            clip=line.sha256,
            frame_rate=line.frame_rate,
            teacher=teacher.sha256 if teacher is not None else None,
            image=sha256(Path(line.image)) if line.image else None,
            parts=self._home.identity["parts"],
        )

    @property
    def _results_folder(self) -> Path:
        return self._folder / self._suite.name

    def _stored(self) -> dict[str, MeasuredLine]:
        files = sorted(self._results_folder.glob("measured-*.jsonl"))
        return {line.key: line for file in files for line in MeasuredLine.read_lines(file)}

    def _tables(
        self,
        makers: Sequence[Maker],
        takes: Sequence[Take],
        measured: Mapping[str, MeasuredLine],
        folders: Mapping[str, Path],
        real: Sequence[ClipLine],
    ) -> dict[str, Any]:
        def measurement(key: str) -> Measurement:
            line = measured[key]
            features = {name: np.asarray(vector) for name, vector in line.features.items()}
            return Measurement(figures=line.figures, features=features)

        lines = {name: ClipFolder(folder).lines() for name, folder in folders.items()}
        first = makers[0].name
        clips = {
            maker.name: [
                measurement(
                    self._key(lines[maker.name][take.file], None if maker.name == first else lines[first][take.file])
                )
                for take in takes
            ]
            for maker in makers
        }
        sets = Sets(takes=takes, clips=clips, real=[measurement(self._key(line, None)) for line in real])
        rows = {maker.name: _row(maker, folders[maker.name].relative_to(self._run.path)) for maker in makers}
        plain, scores = tables(self._suite, sets, rows)
        note = self._material.note if self._material else ""
        results = {
            "program": self._run.key,
            "benchmark": self._suite.name,
            "clips": len(takes),
            "seeds": self._seeds,
            "prompts": len({take.item.key for take in takes}),
            "reference_clips": len(real),
            **plain,
            "source": note,
        }
        file = EvalFile(**results)
        file.write(self._results_folder / "results.json")
        text = "".join(score.line() + "\n" for score in scores)
        (self._results_folder / "clips.jsonl").write_text(text, encoding="utf-8")
        if "student" in folders:
            write_side_by_side(self._results_folder / "side-by-side", takes, folders[first], folders["student"], scores)
        for warning in results["warnings"]:
            self._display.line(warning)
        return file.dump()


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
