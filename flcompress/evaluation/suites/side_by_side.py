"""Small videos of teacher and student side by side, chosen by a fixed rule and not by hand, for the report."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from flcompress.clip_figures import Frames
from flcompress.core.records import ScoreLine
from flcompress.evaluation.clips.studio import Take
from flcompress.runtime.clip_folder import ClipFolder, read_frames, write_frames

SPREAD, WORST = 4, 2
"""Prompts that are shown: evenly spread over the list, and those with the least of the teacher's motion."""

HEIGHT, GAP = 160, 4
"""Pixels of a shown clip's height, and between the two."""


def write_side_by_side(
    folder: Path, takes: Sequence[Take], teacher: Path, student: Path, scores: Sequence[ScoreLine]
) -> None:
    """Write the videos, the teacher left, and `clips.jsonl` that names them in order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rates = {name: line.frame_rate for name, line in ClipFolder(teacher).lines().items()}
    lines = []
    for index, take in enumerate(choose(takes, teacher.name.rpartition("-")[0], scores)):
        left, right = read_frames(teacher / take.file), read_frames(student / take.file)
        file = f"{index:02d}.mp4"
        write_frames(pair(left, right), folder / file, rates[take.file])
        lines.append(
            ScoreLine(contender="student", file=file, prompt=take.item.prompt, seed=take.seed, figures={}).line()
        )
    (folder / "clips.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def choose(takes: Sequence[Take], teacher: str, scores: Sequence[ScoreLine]) -> list[Take]:
    """Return the first clip of `SPREAD` prompts evenly spread over the list, and of the `WORST` ones."""
    first: dict[str, Take] = {}
    for take in takes:
        first.setdefault(take.item.key, take)
    listed = list(first.values())
    spread = {int(index) for index in np.linspace(0, len(listed) - 1, min(SPREAD, len(listed))).round()}
    flow = {(score.contender, score.file): score.figures.get("flow") for score in scores}

    def share(index: int) -> float:
        ours, theirs = (flow.get((name, listed[index].file)) for name in ("student", teacher))
        return ours / theirs if ours is not None and theirs else float("inf")

    left = sorted(set(range(len(listed))) - spread, key=share)
    return [listed[index] for index in (*sorted(spread), *left[:WORST])]


def pair(left: Frames, right: Frames) -> Frames:
    """Return two clips next to each other at one height, as long as the shorter."""
    frames = []
    for a, b in zip(left, right, strict=False):
        shown = [_scale(frame) for frame in (a, b)]
        frames.append(np.hstack([shown[0], np.zeros((HEIGHT, GAP, 3), np.uint8), shown[1]]))
    return np.stack(frames)


def _scale(frame: Frames) -> Frames:
    height, width = frame.shape[:2]
    method = cv2.INTER_AREA if height > HEIGHT else cv2.INTER_NEAREST
    scaled = cv2.resize(np.ascontiguousarray(frame), (round(width * HEIGHT / height), HEIGHT), interpolation=method)
    return np.asarray(scaled, dtype=np.uint8)
