"""Video files with captions: found, checked and decoded with PyAV."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from flcompress.errors import DataError


@dataclass(frozen=True, slots=True)
class VideoFile:
    """One clip on disk."""

    path: Path
    caption: str


def list_videos(folder: Path, captions: Path) -> list[VideoFile]:
    """The videos that a captions file names.

    Args:
        folder: where the files lie.
        captions: JSON lines, one `{"file": "clip.mp4", "caption": "..."}` a video.

    Raises:
        DataError: not JSON lines, a key missing, a file missing, or no line at all.
    """
    found = []
    for number, line in enumerate(captions.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            file, caption = record["file"], record["caption"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{captions}:{number}: {line.strip()[:60]!r} given, expected {{"file": ..., "caption": ...}}'
            ) from error
        if not (folder / file).is_file():
            raise DataError(f"{captions}:{number}: {folder / file}: no such video; expected a file in {folder}")
        found.append(VideoFile(folder / file, str(caption)))
    if not found:
        raise DataError(f"{captions}: no clips; expected at least one line")
    return found


def video_size(path: Path) -> tuple[int, int, int]:
    """(frames, height, width) of a video, by decoding its packets' headers only where the container counts frames."""
    import av

    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(1 for _ in container.decode(stream))
            return frames, stream.codec_context.height, stream.codec_context.width
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path}: not a video that can be decoded ({error}); remove its line or replace it") from error


def check_sizes(videos: list[VideoFile]) -> tuple[int, int, int]:
    """The one size that all videos have; DataError names the first that differs."""
    first = video_size(videos[0].path)
    for video in videos[1:]:
        size = video_size(video.path)
        if size != first:
            raise DataError(
                f"{video.path}: {size[0]} x {size[1]} x {size[2]} (frames, height, width) given, expected "
                f"{first[0]} x {first[1]} x {first[2]} as {videos[0].path.name}; a dataset has one size"
            )
    return first


def decode_video(path: Path) -> torch.Tensor:
    """All frames: [3, frames, height, width] in [-1, 1]."""
    import av

    with av.open(str(path)) as container:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1.0
