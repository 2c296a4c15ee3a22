"""Video files: measured and decoded with PyAV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flcompress.data.sizes import Size
from flcompress.errors import FlcompressError


class BrokenVideo(FlcompressError):  # noqa: N818 (what it is, not what went wrong here)
    """A file that cannot be decoded; the message is the reason alone."""


SLOWER = 0.98
"""Share of a wanted frame rate that a video may have: one of 23.976 frames a second will do for 24."""

_CLOCK = 1e-3
"""Seconds; some containers round times to it. Of two frames as near as that, the earlier is taken."""


def video_size(path: Path, fps: float | None = None) -> Size:
    """(frames, height, width) as it is shown: the first frame is decoded, the others counted.

    Args:
        path: the file.
        fps: count the frames that are shown at this rate, as `read_clip` takes them; None: all.

    Raises:
        BrokenVideo: no video, a damaged one, or one of fewer frames a second.
    """
    with _opened(path) as container:
        frames = container.streams.video[0].frames
        first = next(container.decode(video=0), None)
    if first is None:
        raise BrokenVideo("no frame can be decoded")
    if fps is not None:
        frames = len(shown(_times(path), fps))
    elif not frames:  # some containers do not tell
        with _opened(path) as container:
            frames = sum(packet.size > 0 for packet in container.demux(video=0))
    turned = _quarter_turns(first) % 2
    height, width = (first.width, first.height) if turned else (first.height, first.width)
    return frames, height, width


def shown(times: Sequence[float], fps: float) -> list[int]:
    """Which frames of a video are shown at a rate: the nearest to each of its moments, from the first frame on.

    Args:
        times: of all its frames, in seconds, ascending; not always evenly spaced.
        fps: frames a second.

    Raises:
        BrokenVideo: the video has fewer: frames would be shown twice.
    """
    known = np.asarray(times) - times[0]
    length = float(known[-1])
    if len(known) - 1 < SLOWER * fps * length:
        raise BrokenVideo(f"{(len(known) - 1) / length:.4g} frames a second, expected at least {fps:g}")
    moments = np.arange(math.floor((length + _CLOCK) * fps) + 1) / fps
    after = np.searchsorted(known, moments).clip(1, max(len(known) - 1, 1))
    earlier, later = moments - known[after - 1], known[after.clip(max=len(known) - 1)] - moments
    late = later < earlier - _CLOCK
    return [int(place) for place in np.where(late, after, after - 1)]


def read_clip(path: Path, bucket: Size, *, resize: bool, fps: float | None = None) -> torch.Tensor:
    """The first frames of a video, centred.

    Args:
        path: the file.
        bucket: (frames, height, width) of the result.
        resize: scale the picture until it just covers the bucket before it is cropped; else only crop.
        fps: take the frames that are shown at this rate; None: one after the other.

    Returns:
        [3, frames, height, width] in [-1, 1].

    Raises:
        BrokenVideo: it cannot be decoded that far.
    """
    frames, height, width = bucket
    chosen = list(range(frames)) if fps is None else shown(_times(path), fps)[:frames]
    pictures = []
    with _opened(path) as container:
        for number, frame in enumerate(islice(container.decode(video=0), chosen[-1] + 1)):
            repeats = chosen.count(number)
            if repeats:
                pictures += [_picture(frame, height, width, resize)] * repeats
    if len(pictures) < frames:
        raise BrokenVideo(f"{len(pictures)} frames can be decoded, {frames} expected from its header")
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def _picture(frame: Any, height: int, width: int, resize: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[height, width, 3] of one frame, upright, its centre."""
    if frame.is_corrupt:
        raise BrokenVideo("a damaged frame")
    turns = _quarter_turns(frame)
    if resize:
        h, w = (width, height) if turns % 2 else (height, width)
        scale = max(h / frame.height, w / frame.width)
        frame = frame.reformat(
            width=max(w, math.floor(frame.width * scale)),
            height=max(h, math.floor(frame.height * scale)),
            format="rgb24",
            interpolation="BICUBIC",
        )
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    if top < 0 or left < 0:
        raise BrokenVideo("its picture changes size")
    centre: np.ndarray[Any, np.dtype[np.uint8]] = picture[top : top + height, left : left + width]
    return centre


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise quarter turns that set a frame upright, as phones note them in the file."""
    turns: int = round(frame.rotation / 90) % 4
    return turns


def _times(path: Path) -> list[float]:
    """When each frame is shown, in seconds; nothing is decoded."""
    with _opened(path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size and not packet.is_discard]
        if not packets or any(packet.pts is None for packet in packets):
            raise BrokenVideo("its frames do not say when they are shown")
        return sorted(float(packet.pts * packet.time_base) for packet in packets)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import av

    try:
        if path.stat().st_size == 0:
            raise BrokenVideo("an empty file")
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise BrokenVideo("no video in it")
            yield container
    except av.FFmpegError as error:
        raise BrokenVideo(f"cannot be decoded ({error.strerror})") from error
    except OSError as error:
        raise BrokenVideo(f"cannot be read ({error.strerror})") from error
