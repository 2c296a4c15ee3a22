"""What most suites share: they measure each clip file by itself, and report figures of clips, of prompts and of sets.

A suite says what it measures on a clip (`measure`), and what of that it reports of a clip, a prompt and a set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from flcompress.clip_figures import Frames
from flcompress.core.records import ScoreLine
from flcompress.evaluation.clips.samplers import Home
from flcompress.evaluation.suites.session import FileSuite, Rows, Session, Task, hash_of_image
from flcompress.evaluation.suites.tables import Measurement, Sets, tables
from flcompress.files import key_of
from flcompress.runtime.clip_files import pixels_of, read_picture
from flcompress.runtime.clip_folder import read_frames
from flcompress.runtime.sizes import sizes_of

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


class ClipSuite(FileSuite):
    """A suite that measures one clip after the other."""

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
    def key(self, task: Task, session: Session, judge: Mapping[str, Any]) -> str:
        """Return a hash of the clip, its teacher's clip, its image and the autoencoder."""
        return key_of(
            suite=self.name,
            version=self.version,
            clip=task.line.sha256,
            frame_rate=task.line.frame_rate,
            teacher=task.teacher[1].sha256 if task.teacher is not None else None,
            image=hash_of_image(task.line),
            parts=session.home.identity["parts"],
        )

    @override
    def measurements(self, tasks: Mapping[str, Task], session: Session) -> Iterator[tuple[str, Measurement]]:
        """Read and measure one clip after the other."""
        for key, task in tasks.items():
            session.world.heartbeat(f"measuring {task.path.name}")
            frames, image = read_frames(task.path), None
            if task.line.image is not None:
                image = pixels_of(read_picture(Path(task.line.image), *frames.shape[1:3])[:, None])[0]
            context = ClipContext(
                frame_rate=task.line.frame_rate,
                encode=partial(_encode, session.home),
                image=image,
                teacher=read_frames(task.teacher[0]) if task.teacher is not None else None,
            )
            yield key, self.measure(frames, context)

    @override
    def tables(self, sets: Sets, rows: Rows, session: Session) -> tuple[dict[str, Any], list[ScoreLine]]:
        """Return means with intervals over prompts, of sets over seeds, and paired differences."""
        return tables(self, sets, rows)


def _encode(home: Home, frames: Frames) -> torch.Tensor:
    """Return the latents of frames, cut to a size that the model takes."""
    grid = sizes_of(home.program)
    length, height, width = grid.fit_frames(len(frames)), *map(grid.fit_pixels, frames.shape[1:3])
    cut = torch.from_numpy(np.ascontiguousarray(frames[:length, :height, :width]))
    return home.parts.encode_clips(cut.permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0).float().cpu()
