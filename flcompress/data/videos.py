"""Measure and decode video files with PyAV, as a player shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from flcompress.data.pictures import BrokenPicture, is_still, open_picture
from flcompress.data.sizes import Size
from flcompress.data.video_frames import (
    BrokenVideo,
    Colours,
    Geometry,
    ShownFrame,
    check_opaque,
    display_matrix,
    in_square_pixels,
    name_colours,
    orientation,
)

_Item = TypeVar("_Item")

SMALLEST_RATE_SHARE = 0.98
"""Least share of the requested frame rate that a video must have: 23.976 fps is accepted for 24."""

_CLOCK = 1e-3
"""Resolution in seconds to which some containers round times; of two frames equally near, the earlier is taken."""

_UNTIMED = "its frames do not say when they are shown"

_EXIF = frozenset({"apng", "mjpeg", "png", "tiff", "webp"})
"""Codecs whose frames can carry EXIF data, which PyAV (17.0 to 18.1) frees twice if a frame's side data are listed."""

_CROPPED = re.compile(r"^ +frame cropping: ", re.IGNORECASE | re.MULTILINE)
_DOLBY_TAGS = frozenset({"dav1", "dva1", "dvav", "dvh1", "dvhe"})
_DOLBY = re.compile(r"^ +dovi configuration record: ", re.IGNORECASE | re.MULTILINE)
"""Lines of FFmpeg's description of a file; in user metadata a key precedes the colon."""

_HEIF = re.compile(r"avi[fs]|he[iv][cmsx]|mif\d|msf\d")
"""Brands of picture files in an MP4 container, where a large picture is many small streams."""


def video_size(path: Path, fps: float | None = None, limit: int | None = None) -> Size:
    """Return (frames, height, width) as shown, by decoding the frames that `read_clip` would read.

    Args:
        path: the file.
        fps: count the frames shown at this rate; None counts all.
        limit: stop counting here; None counts to the end.

    Raises:
        BrokenVideo: no video, or one that is damaged, cannot be shown as intended, or has a lower frame rate.
    """
    frames, size = 0, (0, 0)
    with _shown_frames(path, fps) as shown:
        for frame in islice(shown, limit):
            frames, size = frames + 1, frame.geometry.shown_size
    if not frames:
        raise BrokenVideo("no frame can be decoded")
    return frames, *size


def read_clip(path: Path, bucket: Size, *, resize: bool, fps: float | None = None) -> torch.Tensor:
    """Read the first frames of a video, cropped to the centre.

    Args:
        path: the file.
        bucket: (frames, height, width) of the result.
        resize: scale the picture to just cover the bucket before cropping; otherwise only crop.
        fps: take the frames shown at this rate; None takes consecutive frames.

    Returns:
        [3, frames, height, width] in [-1, 1].

    Raises:
        BrokenVideo: as `video_size`, or too few frames can be decoded.
    """
    frames, height, width = bucket
    with _shown_frames(path, fps) as shown:
        pictures = [frame.pixels(height, width, resize=resize) for frame in islice(shown, frames)]
    if len(pictures) < frames:
        raise BrokenVideo(f"{len(pictures)} frames can be decoded, {frames} expected from its header")
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def check_rate(times: Sequence[float], fps: float) -> None:
    """Raise BrokenVideo if sampling at a rate would repeat frames.

    Args:
        times: times of all frames of a video, in seconds, ascending.
        fps: frames per second.
    """
    length = times[-1] - times[0]
    if len(times) - 1 < SMALLEST_RATE_SHARE * fps * length:
        raise BrokenVideo(f"{(len(times) - 1) / length:.4g} frames a second, expected at least {fps:g}")


def at_rate(timed: Iterable[tuple[float, _Item]], fps: float) -> Iterator[_Item]:
    """Resample frames to a rate: the frame nearest to each sampling time, from the first frame on.

    Args:
        timed: frames with their times in seconds, ascending, not necessarily evenly spaced.
        fps: frames per second.
    """
    number, start = 0, 0.0
    before: tuple[float, _Item] | None = None
    for time, frame in timed:
        if before is None:
            start, before = time, (0.0, frame)
            continue
        elapsed = time - start
        if elapsed < before[0]:
            raise BrokenVideo("its frames go back in time")
        while (moment := number / fps) <= elapsed:
            yield frame if elapsed - moment < moment - before[0] - _CLOCK else before[1]
            number += 1
        before = elapsed, frame
    while before is not None and number / fps <= before[0] + _CLOCK:
        yield before[1]
        number += 1


@contextmanager
def _shown_frames(path: Path, fps: float | None) -> Iterator[Iterator[ShownFrame]]:
    """Yield the frames of a file in presentation order."""
    if is_still(path):
        yield iter([_still(path)])
        return
    if fps is None:
        with _open_video(path) as opened:
            yield _decode(*opened)
        return
    times, guessed = _times(path)
    check_rate(times, fps)
    with _open_video(path) as opened:
        frames = _decode(*opened)
        yield at_rate(zip(times, frames, strict=False) if guessed else map(_with_time, frames), fps)


def _with_time(frame: ShownFrame) -> tuple[float, ShownFrame]:
    if frame.time is None:
        raise BrokenVideo(_UNTIMED)
    return frame.time, frame


def _still(path: Path) -> ShownFrame:
    import av

    try:
        frame = av.VideoFrame.from_ndarray(np.asarray(open_picture(path)), format="rgb24")
    except BrokenPicture as error:
        raise BrokenVideo(str(error)) from error
    size = frame.height, frame.width
    return ShownFrame(frame, Geometry(size, size))


def _decode(container: Any, stream: Any) -> Iterator[ShownFrame]:
    """Yield every shown frame; FFmpeg decodes and drops those that an edit list hides."""
    container_colours = Colours.of(stream.codec_context)  # some decoders forget what only the container says
    promised, count, known = _header_frame_count(container, stream), 0, None
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise BrokenVideo("a damaged frame")
        if frame.interlaced_frame:
            raise BrokenVideo("interlaced; deinterlace it first, for example with ffmpeg -vf bwdif")
        check_opaque(frame)
        name_colours(frame, container_colours)
        shape = _geometry(frame, stream), stream.codec_context.sample_aspect_ratio
        if shape != (known or shape):
            raise BrokenVideo("its picture changes size or shape")
        count, known = count + 1, shape
        yield ShownFrame(frame, shape[0], frame.time)
    if count < promised:
        raise BrokenVideo(f"{count} frames can be decoded, {promised} expected from its header")


def _geometry(frame: Any, stream: Any) -> Geometry:
    stored = frame.height, frame.width
    square = in_square_pixels(*stored, stream.sample_aspect_ratio)
    return Geometry(stored, square, *_orientation(frame, listed=stream.codec_context.name not in _EXIF))


def _orientation(frame: Any, *, listed: bool) -> tuple[bool, int]:
    """Return (mirrored, quarter turns) from the display matrix, or from its angle alone if side data are not listed."""
    if listed:
        try:
            matrix = display_matrix(frame)
        except ValueError:  # among them is a kind that PyAV does not know
            pass
        else:
            return (False, 0) if matrix is None else orientation(matrix)
    return False, round(frame.rotation / 90) % 4


def _header_frame_count(container: Any, stream: Any) -> int:
    """Return the number of shown frames in the header; 0 if it lists none, as in Matroska."""
    listed = stream.index_entries
    if not stream.frames or ("mp4" not in container.format.name and len(listed) < stream.frames):
        return int(stream.frames)  # no list, or that of a file which was cut off
    from_key = dropwhile(lambda entry: not entry.is_keyframe, listed)
    return sum(entry.size > 0 and not entry.is_discard for entry in from_key)


def _times(path: Path) -> tuple[list[float], bool]:
    """Return presentation times in seconds, ascending, and whether frames' own times differ; decodes nothing.

    Containers that know only when a packet is decoded (AVI) report that as its frame's time, so reordered frames carry
    each other's times.
    """
    with _open_video(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not packets or any(packet.pts is None for packet in packets):
            raise BrokenVideo(_UNTIMED)
        times = [float(packet.pts * packet.time_base) for packet in packets]
        return sorted(times), stream.codec_context.has_b_frames and times == sorted(times)


@contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a container, and yield it with its video stream after checking the header."""
    import av
    from av.stream import Disposition

    try:
        if path.stat().st_size == 0:
            raise BrokenVideo("an empty file")
        # An absolute path is no protocol ("a:b.mp4"), and a % in it no pattern for many files.
        with av.open(str(path.absolute()), metadata_errors="ignore", options={"pattern_type": "none"}) as container:
            tracks = (track for track in container.streams.video if not track.disposition & Disposition.attached_pic)
            stream = next(tracks, None)
            if stream is None:
                raise BrokenVideo("no video in it")
            if stream.codec_context is None:
                raise BrokenVideo("no decoder for it")
            _check_header(container, stream)
            yield container, stream
    except av.FFmpegError as error:
        raise BrokenVideo(f"cannot be decoded ({error.strerror})") from error
    except OSError as error:
        raise BrokenVideo(f"cannot be read ({error.strerror})") from error


def _check_header(container: Any, stream: Any) -> None:
    """Raise BrokenVideo for files that PyAV decodes unlike players show them."""
    if _HEIF.fullmatch(container.metadata.get("major_brand", "")):
        raise BrokenVideo("a HEIF picture; save it as PNG or JPEG")
    if {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1":
        raise BrokenVideo("transparent in parts; put it over a background first")
    described = _description(container)
    if stream.codec_context.codec_tag in _DOLBY_TAGS or _DOLBY.search(described):
        raise BrokenVideo("Dolby Vision; convert it to standard range (BT.709) first")
    if _CROPPED.search(described):
        raise BrokenVideo("its container crops the picture, which players do or do not; crop it first")


def _description(container: Any) -> str:
    """Return FFmpeg's description of a file, the only way PyAV exposes a stream's side data, by logging it."""
    import av.logging

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        return str(container.dumps_format())
    finally:
        av.logging.set_level(level)
