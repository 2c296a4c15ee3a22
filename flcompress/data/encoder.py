"""Encode the shards of a latent dataset, one at a time in one process, with the pipeline's own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flcompress.ahead import ahead
from flcompress.data.compact import compact
from flcompress.data.index import LATENTS, PER_CLIP, ClipRecord, ClipShard, PromptShard, write_shard
from flcompress.data.pictures import without_warnings
from flcompress.data.sizes import Size
from flcompress.data.video_frames import BrokenVideo
from flcompress.data.videos import read_clip, video_size
from flcompress.models.families.family import Family
from flcompress.models.parts import Parts
from flcompress.models.tensor_memory import free_gpu_memory

Layout = Callable[[Family, Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
"""Conditioning [n, ...] of a family -> the tensors that are stored."""

PROMPTS_AT_ONCE = 8
PIXELS_AT_ONCE = 1 << 19
"""Pixels up to which clips are batched; a single clip may have more."""


@dataclass(frozen=True, slots=True)
class PromptTask:
    """A shard of prompts to encode."""

    file: str
    texts: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of prompts."""
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class ClipTask:
    """A shard of clips of one bucket to encode; `texts` are the clips' captions."""

    file: str
    bucket: Size
    clips: tuple[ClipRecord, ...]
    texts: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of clips."""
        return len(self.clips)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A video that is skipped, and the reason."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """Result of a task: its shard, or None if no clip could be read, and the skipped clips."""

    task: str
    shard: PromptShard | ClipShard | None
    skipped: tuple[Skipped, ...] = ()


@dataclass(frozen=True, slots=True)
class _Batch:
    """Clips that are encoded at once: pixels [n, 3, frames, height, width] in [-1, 1]; and videos skipped before."""

    clips: tuple[ClipRecord, ...]
    texts: tuple[str, ...]
    pixels: torch.Tensor
    skipped: tuple[Skipped, ...]


def _unwatched() -> None:
    """Signal nothing: nobody waits for this process."""


@dataclass(eq=False)
class Encoder:
    """Encodes with the parts of one pipeline on one device; they are loaded when first needed.

    Attributes:
        index: the pipeline's `model_index.json`.
        components: folders of its parts.
        device: "cpu", "cuda:0", ...
        max_sequence_length: tokens that every prompt is padded to.
        out: folder that shards are written to.
        videos: folder of the clips' files.
        resize: scale clips to cover their bucket before cropping.
        fps: sampling rate in frames per second; None keeps every frame.
        frames: most frames read from a video; None reads all.
        heartbeat: called before each video that is measured, and each batch that is encoded.
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
    heartbeat: Callable[[], None] = _unwatched

    _open: tuple[type, Parts] | None = field(default=None, init=False)

    def make(self, task: PromptTask | ClipTask) -> ShardResult:
        """Encode one shard; its bytes depend neither on the process nor on the order of tasks."""
        return self._make(task, compact)

    def make_as_version_1(self, task: PromptTask | ClipTask) -> ShardResult:
        """Encode one shard as version 1 of the format stores it: padded, in fp32."""
        return self._make(task, lambda family, tensors: dict(tensors))

    def _make(self, task: PromptTask | ClipTask, layout: Layout) -> ShardResult:
        if self._open is None or self._open[0] is not type(task):
            # Free the text encoder before clips are encoded: it can fill a GPU.
            self._open = None
            free_gpu_memory()
            self._open = (type(task), Parts(self.index, self.components, self.device))
        parts = self._open[1]
        if isinstance(task, PromptTask):
            return self._prompts(task, parts, layout)
        return self._clips(task, parts, layout)

    def measure(self, files: Sequence[str]) -> dict[str, Size | Skipped]:
        """Return each video's own size, or the reason why it has none."""
        sizes: dict[str, Size | Skipped] = {}
        for file in files:
            self.heartbeat()
            try:
                sizes[file] = video_size(self.videos / file, self.fps, self.frames)
            except BrokenVideo as error:
                sizes[file] = Skipped(file, str(error))
        return sizes

    def _prompts(self, task: PromptTask, parts: Parts, layout: Layout) -> ShardResult:
        groups = [task.texts[n : n + PROMPTS_AT_ONCE] for n in range(0, len(task.texts), PROMPTS_AT_ONCE)]
        encoded = []
        for group in groups:
            self.heartbeat()
            encoded.append(parts.encode_prompts(group, self.max_sequence_length))
        tensors = concatenate(encoded)
        digest, size = write_shard(self.out / task.file, layout(parts.family, tensors))
        return ShardResult(task.file, PromptShard(file=task.file, sha256=digest, bytes=size, prompts=len(task.texts)))

    def _clips(self, task: ClipTask, parts: Parts, layout: Layout) -> ShardResult:
        usable: list[ClipRecord] = []
        skipped: list[Skipped] = []
        encoded: list[dict[str, torch.Tensor]] = []
        # A thread decodes the next videos while these are encoded: a GPU does not wait for the processor.
        with without_warnings(), ahead(self._batches(task)) as batches:
            for batch in batches:
                skipped += batch.skipped
                if batch.clips:
                    self.heartbeat()
                    usable += batch.clips
                    encoded.append(clip_tensors(parts, batch.pixels, batch.texts, self.max_sequence_length))
        tensors = concatenate(encoded) if usable else {LATENTS: torch.zeros(0, 1)}
        finite = tensors[LATENTS].flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            flags = finite.tolist()
            skipped += [
                Skipped(clip.file, "its latents are not finite")
                for clip, fine in zip(usable, flags, strict=True)
                if not fine
            ]
            usable = [clip for clip, fine in zip(usable, flags, strict=True) if fine]
            tensors = {name: value[finite] for name, value in tensors.items()}
        if not usable:
            return ShardResult(task.file, None, tuple(skipped))
        digest, size = write_shard(self.out / task.file, clip_shard(tensors, parts.family, layout))
        shard = ClipShard(file=task.file, sha256=digest, bytes=size, size=task.bucket, clips=tuple(usable))
        return ShardResult(task.file, shard, tuple(skipped))

    def _batches(self, task: ClipTask) -> Iterator[_Batch]:
        """Read the videos of a task, and yield them in batches to encode at once; the last may be empty."""
        frames, height, width = task.bucket
        size = max(1, PIXELS_AT_ONCE // (frames * height * width))
        clips: list[ClipRecord] = []
        texts: list[str] = []
        pixels: list[torch.Tensor] = []
        skipped: list[Skipped] = []

        def batch() -> _Batch:
            stacked = torch.stack(pixels) if pixels else torch.empty(0)
            read = _Batch(tuple(clips), tuple(texts), stacked, tuple(skipped))
            for collected in (clips, texts, pixels, skipped):
                collected.clear()
            return read

        for clip, text in zip(task.clips, task.texts, strict=True):
            try:
                pixels.append(read_clip(self.videos / clip.file, task.bucket, resize=self.resize, fps=self.fps))
            except BrokenVideo as error:
                skipped.append(Skipped(clip.file, str(error)))
                continue
            clips.append(clip)
            texts.append(text)
            if len(clips) == size:
                yield batch()
        yield batch()


def clip_shard(
    tensors: Mapping[str, torch.Tensor], family: Family, layout: Layout = compact
) -> dict[str, torch.Tensor]:
    """Return what a shard stores of `clip_tensors`: latents as they are, the clips' own conditioning compacted."""
    own = {name.removeprefix(PER_CLIP): value for name, value in tensors.items() if name.startswith(PER_CLIP)}
    return {LATENTS: tensors[LATENTS], **{PER_CLIP + name: value for name, value in layout(family, own).items()}}


def clip_tensors(parts: Parts, clips: torch.Tensor, texts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
    """Return a shard's tensors for clips [n, 3, frames, height, width] in [-1, 1] and their captions."""
    own = parts.encode_images(clips, texts, length)
    return {LATENTS: parts.encode_clips(clips), **{PER_CLIP + name: value for name, value in own.items()}}


def concatenate(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate named tensors along their first axis, on the CPU."""
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
