"""Folders of clip files: safe names, the manifest that makes a killed command resumable, reading and writing."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flcompress.clip_figures import Frames
from flcompress.core.records import ClipLine
from flcompress.errors import FlcompressError
from flcompress.files import append_line, replacing, sha256
from flcompress.runtime.clip_files import pixels_of, write_h264

CRF = 10
"""Quality of the h264 files, as VBench's protocol has it."""

SLUG = 40
"""Letters of the prompt in a file's name; a hash of prompt and image makes it unique."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """What a clip is made from.

    Attributes:
        prompt: its text.
        image: its first frame, for models that start from one.
    """

    prompt: str
    image: Path | None = None

    @cached_property
    def key(self) -> str:
        """Twelve digits of the hash of the prompt and the image's content."""
        digest = hashlib.sha256(self.prompt.encode())
        if self.image is not None:
            digest.update(b"\0" + self.image.read_bytes())
        return digest.hexdigest()[:12]


def clip_name(prompt: str, key: str, seed: int, number: int) -> str:
    """Return a file name that any file system takes, whatever the prompt: no other clip has it."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:SLUG].strip("-")
    return f"{slug or 'clip'}-{key}-s{seed}-{number}.mp4"


def write_frames(frames: Frames, path: Path, frame_rate: float) -> None:
    """Write frames as h264, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        write_h264(frames, temporary, frame_rate, CRF)


def read_frames(path: Path) -> Frames:
    """Return the frames of a clip file.

    Raises:
        FlcompressError: it is broken; the message names it.
    """
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise FlcompressError(f"{path}: cannot be decoded ({error}); delete it and give the same command again") from (
            error
        )
    if not frames:
        raise FlcompressError(f"{path}: has no frames; delete it and give the same command again")
    return np.stack(frames)


class ClipFolder:
    """The clips of one model, and the manifest that names them.

    Every process adds to a manifest of its own, so no two write one file.

    Args:
        folder: where they are.
        rank: which process this is.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder, self._rank = folder, rank

    def lines(self) -> dict[str, ClipLine]:
        """Return name -> what the manifests say of each clip; the latest line counts."""
        manifests = sorted(self.folder.glob("manifest-*.jsonl"))
        return {line.file: line for manifest in manifests for line in ClipLine.read_lines(manifest)}

    def intact(self, names: Iterable[str]) -> dict[str, ClipLine]:
        """Return those of the named clips that are there as they were written; what is missing or changed is not."""
        lines = self.lines()
        wanted = {name: lines[name] for name in names if name in lines}
        return {name: line for name, line in wanted.items() if self._unchanged(line)}

    def strangers(self, names: Iterable[str]) -> list[str]:
        """Return the clip files that no manifest and none of `names` names."""
        known = {*self.lines(), *names}
        return sorted(path.name for path in self.folder.glob("*.mp4") if path.name not in known)

    def add(self, clip: torch.Tensor | Frames, frame_rate: float, **facts: Any) -> ClipLine:
        """Write a clip, and then its line of the manifest, so that a line means a whole file."""
        path, pixels = self.folder / str(facts["file"]), pixels_of(clip) if isinstance(clip, torch.Tensor) else clip
        write_frames(pixels, path, frame_rate)
        frames, height, width = pixels.shape[:3]
        size = {"frames": int(frames), "height": int(height), "width": int(width)}
        line = ClipLine(sha256=sha256(path), frame_rate=frame_rate, **size, **facts)
        append_line(self.folder / f"manifest-{self._rank}.jsonl", line.line())
        return line

    def _unchanged(self, line: ClipLine) -> bool:
        path = self.folder / line.file
        return path.is_file() and sha256(path) == line.sha256
