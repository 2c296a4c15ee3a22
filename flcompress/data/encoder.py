"""Make the shards of a latent dataset: one process's work on one shard at a time, with the pipeline's own parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flcompress.data.index import LATENTS, PER_CLIP, Clip, ClipShard, PromptShard, write_shard
from flcompress.data.sizes import Size
from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import read_clip, video_size
from flcompress.models.parts import Parts
from flcompress.models.tensor_memory import free_gpu_memory

PROMPTS_AT_ONCE = 8
PIXELS_AT_ONCE = 1 << 19
"""Clips are encoded together up to so many pixels; one alone may have more."""


@dataclass(frozen=True, slots=True)
class PromptTask:
    """One shard of prompts to make."""

    file: str
    texts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class ClipTask:
    """One shard of clips of one bucket to make; `texts` are the clips' captions."""

    file: str
    bucket: Size
    clips: tuple[Clip, ...]
    texts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.clips)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A video that is left out, and why."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a task: its shard, unless no clip of it could be read, and the clips left out."""

    task: str
    shard: PromptShard | ClipShard | None
    skipped: tuple[Skipped, ...] = ()


@dataclass(eq=False)
class Encoder:
    """Encodes with the parts of one pipeline on one device; they are loaded when first needed.

    Attributes:
        index: the pipeline's `model_index.json`.
        components: folders of its parts.
        device: "cpu", "cuda:0", ...
        max_sequence_length: tokens a prompt is padded to.
        out: where shards are written.
        videos: folder of the clips' files.
        resize: scale clips to cover their bucket before they are cropped.
        fps: frames a second that are taken; None takes every frame.
        frames: how many of them are taken at most; None: all.
    """

    index: Mapping[str, Any]
    components: Mapping[str, Path]
    device: str
    max_sequence_length: int
    out: Path
    videos: Path
    resize: bool
    fps: float | None
    frames: int | None = None

    _open: tuple[type, Parts] | None = field(default=None, init=False)

    def make(self, task: PromptTask | ClipTask) -> Made:
        """Make one shard; the same bytes whichever process makes it, and whenever."""
        if self._open is None or self._open[0] is not type(task):
            # What prompts needed is let go before clips are encoded: a text encoder can fill a GPU.
            self._open = None
            free_gpu_memory()
            self._open = (type(task), Parts(self.index, self.components, self.device))
        parts = self._open[1]
        return self._prompts(task, parts) if isinstance(task, PromptTask) else self._clips(task, parts)

    def measure(self, files: Sequence[str]) -> dict[str, Size | Skipped]:
        """Each video's own size, or why it has none."""
        found: dict[str, Size | Skipped] = {}
        for file in files:
            try:
                found[file] = video_size(self.videos / file, self.fps, self.frames)
            except BrokenVideo as error:
                found[file] = Skipped(file, str(error))
        return found

    def _prompts(self, task: PromptTask, parts: Parts) -> Made:
        groups = [task.texts[n : n + PROMPTS_AT_ONCE] for n in range(0, len(task.texts), PROMPTS_AT_ONCE)]
        tensors = joined([parts.encode_prompts(group, self.max_sequence_length) for group in groups])
        digest, size = write_shard(self.out / task.file, tensors)
        return Made(task.file, PromptShard(file=task.file, sha256=digest, bytes=size, prompts=len(task.texts)))

    def _clips(self, task: ClipTask, parts: Parts) -> Made:
        frames, height, width = task.bucket
        together = max(1, PIXELS_AT_ONCE // (frames * height * width))
        kept: list[Clip] = []
        skipped: list[Skipped] = []
        encoded: list[dict[str, torch.Tensor]] = []
        waiting: list[tuple[torch.Tensor, str]] = []
        for clip, text in zip(task.clips, task.texts, strict=True):
            try:
                pixels = read_clip(self.videos / clip.file, task.bucket, resize=self.resize, fps=self.fps)
            except BrokenVideo as error:
                skipped.append(Skipped(clip.file, str(error)))
                continue
            kept.append(clip)
            waiting.append((pixels, text))
            if len(waiting) == together:
                encoded.append(self._encode(waiting, parts))
                waiting.clear()
        if waiting:
            encoded.append(self._encode(waiting, parts))
        tensors = joined(encoded) if kept else {LATENTS: torch.zeros(0, 1)}
        finite = tensors[LATENTS].flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            flags = finite.tolist()
            skipped += [
                Skipped(one.file, "its latents are not finite")
                for one, fine in zip(kept, flags, strict=True)
                if not fine
            ]
            kept = [one for one, fine in zip(kept, flags, strict=True) if fine]
            tensors = {name: value[finite] for name, value in tensors.items()}
        if not kept:
            return Made(task.file, None, tuple(skipped))
        digest, size = write_shard(self.out / task.file, tensors)
        shard = ClipShard(file=task.file, sha256=digest, bytes=size, size=task.bucket, clips=tuple(kept))
        return Made(task.file, shard, tuple(skipped))

    def _encode(self, some: Sequence[tuple[torch.Tensor, str]], parts: Parts) -> dict[str, torch.Tensor]:
        clips = torch.stack([clip for clip, _ in some])
        return clip_tensors(parts, clips, [text for _, text in some], self.max_sequence_length)


def clip_tensors(parts: Parts, clips: torch.Tensor, texts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    """A shard's tensors for clips [n, 3, frames, height, width] in [-1, 1] and their captions."""
    own = parts.encode_images(clips, texts, length)
    return {LATENTS: parts.encode_clips(clips), **{PER_CLIP + name: value for name, value in own.items()}}


def joined(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Named tensors, batch first, put one after the other on the CPU."""
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
