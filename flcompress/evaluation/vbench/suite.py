"""The suite `vbench-i2v`: VBench-I2V's own prompts and pictures, judged by VBench in an environment of its own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.clip_figures.motion import JUDGED_RATE, MIN_FRAMES
from flcompress.core.records import ClipLine, ScoreLine
from flcompress.core.suites import SuiteRequest
from flcompress.distributed.launch import Launch
from flcompress.errors import DataError, RequestError
from flcompress.evaluation.clips.prompts import Material, read_material
from flcompress.evaluation.clips.studio import Take
from flcompress.evaluation.suites.session import FileSuite, Rows, Session, Task
from flcompress.evaluation.suites.tables import Figure, Measurement, Sets
from flcompress.evaluation.vbench.processes import Interpreter, Job
from flcompress.evaluation.vbench.scores import BACKGROUND, DIMENSIONS, SUBJECT, ClipScores, Tally, score_tables
from flcompress.files import key_of, replacing
from flcompress.runtime.clip_folder import Item

RATIOS = {"1-1": 1.0, "8-5": 1.6, "7-4": 1.75, "16-9": 16.0 / 9.0}
"""Folder of VBench's cropped pictures -> width over height."""

CLIPS = 5
"""Clips of a prompt that the protocol asks for."""

LEAST_MOTION = 0.8
"""A student that is dynamic less often than this share of its teacher is reported."""


class VBenchI2V(FileSuite):
    """VBench-I2V, without camera motion."""

    name: ClassVar[str] = "vbench-i2v"
    options: ClassVar[tuple[str, ...]] = ("sample", "vbench_python", "vbench_repo")
    size: ClassVar[tuple[int, int] | None] = (1, CLIPS)
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(key="average4", label="Average of 4", better=1, headline=True),
        Figure(key="average6", label="Average of 6", better=1, headline=True),
        Figure(key="total", label="Total, no camera motion", better=1),
        Figure(key="dynamic_degree", label="Dynamic degree", better=0, headline=True),
        Figure(key="motion_smoothness", label="Motion smoothness", better=1),
        Figure(key="aesthetic_quality", label="Aesthetic quality", better=1),
        Figure(key="imaging_quality", label="Imaging quality", better=1),
        Figure(key="i2v_subject", label="I2V subject", better=1),
        Figure(key="i2v_background", label="I2V background", better=1),
        Figure(key="subject_consistency", label="Subject consistency", better=1),
        Figure(key="background_consistency", label="Background consistency", better=1),
    )

    def __init__(self) -> None:
        self._judge = Interpreter(python=Path(), repo=Path())

    @override
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        for name in ("vbench_python", "vbench_repo"):
            if request.own.get(name) is None:
                raise RequestError(
                    f"--{name.replace('_', '-')}: not given; the suite vbench-i2v needs the Python of VBench's "
                    "environment and a checkout of VBench, see docs/evaluation.md"
                )
        sample = request.own.get("sample")
        if sample is not None and request.prompts is not None:
            raise RequestError(f"--sample: {sample} given with --prompts; it is for VBench's own prompts alone")
        self._judge = Interpreter(python=Path(request.own["vbench_python"]), repo=Path(request.own["vbench_repo"]))
        return super().evaluate(request)

    @override
    def prepare(self, session: Session) -> dict[str, Any]:
        frames, height, width = session.home.size
        program = session.home.program
        if program.pipeline_class not in program.family.from_image:
            raise RequestError(
                f"--suite: vbench-i2v given, but a {program.pipeline_class} starts from text alone; it judges models "
                "that make a clip from its first frame: give --suite proxies"
            )
        _check_frames(frames, session.home.frame_rate, f"clips of {frames} x {height} x {width}")
        return self._judge.describe()

    @override
    def material(self, session: Session, frames: Path) -> Material:
        if session.request.prompts is not None:
            return read_material(session.request, session.run, session.home.program, session.device, frames)
        if session.request.images is not None:
            raise RequestError(f"--images: {session.request.images} given without --prompts; give both, or neither")
        _, height, width = session.home.size
        ratio = min(RATIOS, key=lambda name: abs(math.log(width / height / RATIOS[name])))
        folder = self._judge.vbench / "vbench2_beta_i2v" / "data" / "crop" / ratio
        entries = spread_over_kinds(list(self._entries.values()))[: session.request.own.get("sample")]
        missing = [entry["image_name"] for entry in entries if not (folder / entry["image_name"]).is_file()]
        if missing:
            raise DataError(
                f"{folder}: {len(missing)} of {len(entries)} pictures are missing, such as {missing[0]!r}; get them "
                f"with sh vbench2_beta_i2v/download_data.sh in {self._judge.vbench}"
            )
        items = tuple(Item(prompt=entry["prompt_en"], image=folder / entry["image_name"]) for entry in entries)
        return Material(items=items, note=f"VBench-I2V's prompts and pictures, {ratio}")

    @cached_property
    def _entries(self) -> dict[str, dict[str, Any]]:
        """Prompt -> what VBench says of it, but for prompts of camera motion."""
        path = self._judge.vbench / "vbench2_beta_i2v" / "vbench2_i2v_full_info.json"
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            return {entry["prompt_en"]: entry for entry in listed if entry["dimension"] != ["camera_motion"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(
                f"--vbench-repo: {path}: cannot be read ({type(error).__name__}: {error}); expected a checkout of "
                "https://github.com/Vchitect/VBench, or of https://github.com/hao-ai-lab/FastVideo with its submodules"
            ) from error

    def _dimensions(self, prompt: str, session: Session) -> Sequence[str]:
        """Return what is judged of a prompt: of VBench's own as it says, of others everything that the judge can."""
        if session.request.prompts is not None:
            return self._judge.dimensions
        kind = SUBJECT if "i2v_subject" in self._entries[prompt]["dimension"] else BACKGROUND
        return tuple(name for name in kind if name in self._judge.dimensions)

    @override
    def parts(self, line: ClipLine, session: Session) -> Sequence[str]:
        dimensions = self._dimensions(line.prompt, session)
        if "dynamic_degree" in dimensions:
            _check_frames(line.frames, line.frame_rate, line.file)
        return dimensions

    @override
    def key(self, task: Task, session: Session, judge: Mapping[str, Any]) -> str:
        decisive = {"clip": task.line.sha256, "item": task.line.item, "dimension": task.part, "judge": dict(judge)}
        return key_of(suite=self.name, version=self.version, **decisive)

    @override
    def measurements(self, tasks: Mapping[str, Task], session: Session) -> Iterator[tuple[str, Measurement]]:
        jobs = [
            Job(
                key=key,
                dimension=task.part,
                video=str(self._protocol_file(task, session).absolute()),
                image=str(Path(task.line.image).absolute()) if task.line.image else None,
                frame_rate=task.line.frame_rate,
            )
            for key, task in sorted(tasks.items(), key=lambda each: (DIMENSIONS.index(each[1].part), each[1].path))
        ]
        answers = self._judge.judge(jobs, _devices(session), session.folder / "workers", session.world.heartbeat)
        for key, score in answers:
            yield key, Measurement(figures={tasks[key].part: score})

    def _protocol_file(self, task: Task, session: Session) -> Path:
        """Return the clip under the name that VBench's own script looks for, in one folder for each contender."""
        line, each = task.line, session.request.clips_per_prompt or 1
        stem = line.prompt if session.request.prompts is None else line.file.rpartition("-s")[0]
        link = session.folder / "videos" / task.path.parent.name / f"{stem}-{line.seed * each + line.number}.mp4"
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(task.path, link.parent)
        if not (link.is_symlink() and str(link.readlink()) == target):
            with replacing(link) as temporary:
                temporary.symlink_to(target)
        return link

    @override
    def tables(self, sets: Sets, rows: Rows, session: Session) -> tuple[dict[str, Any], list[ScoreLine]]:
        tallies = {
            name: Tally(
                [
                    ClipScores(
                        prompt=line.item,
                        file=f"{name}: {line.file}",
                        dimensions=self._dimensions(line.prompt, session),
                        scores=clip.figures,
                        frames=line.frames,
                    )
                    for line, clip in zip(sets.lines[name], clips, strict=True)
                ]
            )
            for name, clips in sets.clips.items()
        }
        contenders, paired = score_tables(tallies, rows)
        scores = [
            ScoreLine(contender=name, file=line.file, prompt=line.prompt, seed=line.seed, figures=dict(clip.figures))
            for name, clips in sets.clips.items()
            for line, clip in zip(sets.lines[name], clips, strict=True)
        ]
        return {
            "floor": {},
            "contenders": contenders,
            "paired": paired,
            "figures": [asdict(figure) for figure in self.figures if any(figure.key in row for row in contenders)],
            "warnings": [*self._departures(sets.takes, session), *_warnings(contenders)],
        }, scores

    def _departures(self, takes: Sequence[Take], session: Session) -> list[str]:
        """Return in which way this is not the protocol, so that nobody sets the figures beside published ones."""
        prompts = len({take.item.key for take in takes})
        each = len(takes) // prompts
        if session.request.prompts is not None:
            return ["note: prompts of a file, not VBench's: not comparable with published figures"]
        if set(self._judge.dimensions) < set(DIMENSIONS):
            return [
                "note: judged by FastVideo's evaluation, which lacks I2V subject and background, so no average of 6"
            ]
        if prompts == len(self._entries) and each == CLIPS:
            return []
        return [
            f"note: {prompts} of VBench's {len(self._entries)} prompts with {each} clips each, where the protocol has "
            f"all with {CLIPS}: not comparable with published figures"
        ]


def spread_over_kinds(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return VBench's entries so ordered that the first n have every kind of picture in proportion; always the same."""
    ordered = []
    for kind in sorted({str(entry.get("image_type")) for entry in entries}):
        members = sorted(
            (entry for entry in entries if str(entry.get("image_type")) == kind),
            key=lambda entry: str(entry["prompt_en"]),
        )
        ordered += [((number + 0.5) / len(members), kind, entry) for number, entry in enumerate(members)]
    return [entry for _, _, entry in sorted(ordered, key=lambda each: each[:2])]


def _check_frames(frames: int, frame_rate: float, what: str) -> None:
    sampled = len(range(0, frames, max(1, round(frame_rate / JUDGED_RATE))))
    if sampled < MIN_FRAMES:
        raise RequestError(
            f"{what}: dynamic degree looks at {sampled} of the {frames} frames at {frame_rate:g} a second, expected at "
            f"least {MIN_FRAMES}: with fewer, every clip counts as dynamic; give --suite proxies"
        )


def _devices(session: Session) -> list[str]:
    """Return the GPUs that this process starts workers on: its own under a launcher, else all there are."""
    if session.device == "cpu":
        return ["cpu"]
    if session.world.size > 1:
        return [f"cuda:{Launch.from_environment().local_rank}"]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def _warnings(contenders: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line where the student is dynamic less often than its teacher, which other dimensions reward."""
    rows = {str(row["name"]): row for row in contenders}
    teacher, student = contenders[0], rows.get("student")
    if student is None or "dynamic_degree" not in student:
        return []
    ours, theirs = (float(row["dynamic_degree"]["mean"]) for row in (student, teacher))
    if ours >= LEAST_MOTION * theirs:
        return []
    return [
        f"warning: {ours:.0%} of the student's clips are dynamic, {theirs:.0%} of {teacher['name']}'s; expected at "
        f"least {LEAST_MOTION:.0%} of that: smoothness and consistency reward clips that stand still"
    ]
