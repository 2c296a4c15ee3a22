"""Video files: measured and decoded with PyAV, as a player shows them."""

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

SLOWER = 0.98
"""Share of a wanted frame rate that a video may have: one of 23.976 frames a second will do for 24."""

_CLOCK = 1e-3
"""Seconds; some containers round times to it. Of two frames as near as that, the earlier is taken."""

_UNTIMED = "its frames do not say when they are shown"

_EXIF = frozenset({"apng", "mjpeg", "png", "tiff", "webp"})
"""Codecs whose frames can carry EXIF data. PyAV (17.0 to 18.1) frees that twice when a frame's side data are listed."""

_CROPPED = re.compile(r"^ +frame cropping: ", re.IGNORECASE | re.MULTILINE)
_DOLBY_TAGS = frozenset({"dav1", "dva1", "dvav", "dvh1", "dvhe"})
_DOLBY = re.compile(r"^ +dovi configuration record: ", re.IGNORECASE | re.MULTILINE)
"""Lines of FFmpeg's description of a file; metadata of the user's have a name before the colon."""

_HEIF = re.compile(r"avi[fs]|he[iv][cmsx]|mif\d|msf\d")
"""Brands of picture files in the container of MP4; a large picture is many small streams there."""


def video_size(path: Path, fps: float | None = None, most: int | None = None) -> Size:
    """(frames, height, width) as it is shown: what `read_clip` would take is decoded and counted.

    Args:
        path: the file.
        fps: count the frames that are shown at this rate; None: all.
        most: count no further; None: to the end.

    Raises:
        BrokenVideo: no video, a damaged one, one that cannot be shown as it is meant, or one of fewer frames a second.
    """
    frames, size = 0, (0, 0)
    with _shown_frames(path, fps) as found:
        for one in islice(found, most):
            frames, size = frames + 1, one.geometry.shown
    if not frames:
        raise BrokenVideo("no frame can be decoded")
    return frames, *size


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
        BrokenVideo: as `video_size`, or it cannot be decoded that far.
    """
    frames, height, width = bucket
    with _shown_frames(path, fps) as found:
        pictures = [one.pixels(height, width, resize=resize) for one in islice(found, frames)]
    if len(pictures) < frames:
        raise BrokenVideo(f"{len(pictures)} frames can be decoded, {frames} expected from its header")
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def check_rate(times: Sequence[float], fps: float) -> None:
    """Raise BrokenVideo where frames would be shown twice at a rate.

    Args:
        times: of all frames of a video, in seconds, ascending.
        fps: frames a second.
    """
    length = times[-1] - times[0]
    if len(times) - 1 < SLOWER * fps * length:
        raise BrokenVideo(f"{(len(times) - 1) / length:.4g} frames a second, expected at least {fps:g}")


def at_rate(timed: Iterable[tuple[float, _Item]], fps: float) -> Iterator[_Item]:
    """What is shown at a rate: the nearest to each of its moments, from the first frame on.

    Args:
        timed: frames, each with its time in seconds, ascending; not always evenly spaced.
        fps: frames a second.
    """
    number, start = 0, 0.0
    before: tuple[float, _Item] | None = None
    for time, frame in timed:
        if before is None:
            start, before = time, (0.0, frame)
            continue
        now = time - start
        if now < before[0]:
            raise BrokenVideo("its frames go back in time")
        while (moment := number / fps) <= now:
            yield frame if now - moment < moment - before[0] - _CLOCK else before[1]
            number += 1
        before = now, frame
    while before is not None and number / fps <= before[0] + _CLOCK:
        yield before[1]
        number += 1


@contextmanager
def _shown_frames(path: Path, fps: float | None) -> Iterator[Iterator[ShownFrame]]:
    """The frames of a file, in the order in which they are shown."""
    if is_still(path):
        yield iter([_still(path)])
        return
    if fps is None:
        with _opened(path) as opened:
            yield _decoded(*opened)
        return
    times, guessed = _times(path)
    check_rate(times, fps)
    with _opened(path) as opened:
        frames = _decoded(*opened)
        yield at_rate(zip(times, frames, strict=False) if guessed else map(_timed, frames), fps)


def _timed(frame: ShownFrame) -> tuple[float, ShownFrame]:
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


def _decoded(container: Any, stream: Any) -> Iterator[ShownFrame]:
    """Every frame that is shown; what an edit list hides is decoded and dropped by FFmpeg."""
    container_colours = Colours.of(stream.codec_context)  # some decoders forget what only the container says
    promised, count, known = _promised(container, stream), 0, None
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
    """(mirrored, quarter turns) by the display matrix; by its angle alone where a frame's side data are not listed."""
    if listed:
        try:
            matrix = display_matrix(frame)
        except ValueError:  # among them is a kind that PyAV does not know
            pass
        else:
            return (False, 0) if matrix is None else orientation(matrix)
    return False, round(frame.rotation / 90) % 4


def _promised(container: Any, stream: Any) -> int:
    """How many frames the header lists as shown; 0 where it lists none, as in Matroska."""
    listed = stream.index_entries
    if not stream.frames or ("mp4" not in container.format.name and len(listed) < stream.frames):
        return int(stream.frames)  # no list, or that of a file which was cut off
    from_key = dropwhile(lambda entry: not entry.is_keyframe, listed)
    return sum(entry.size > 0 and not entry.is_discard for entry in from_key)


def _times(path: Path) -> tuple[list[float], bool]:
    """When each frame is shown, in seconds, ascending, and whether its own time is another; nothing is decoded.

    Containers that know only when a packet is decoded (AVI) give that as the time of its frame. Frames that are decoded
    before others and shown after them then have each other's times.
    """
    with _opened(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not packets or any(packet.pts is None for packet in packets):
            raise BrokenVideo(_UNTIMED)
        times = [float(packet.pts * packet.time_base) for packet in packets]
        return sorted(times), stream.codec_context.has_b_frames and times == sorted(times)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A container and its video stream, which can be shown as far as the header says."""
    import av
    from av.stream import Disposition

    try:
        if path.stat().st_size == 0:
            raise BrokenVideo("an empty file")
        # An absolute path is no protocol ("a:b.mp4"), and a % in it no pattern for many files.
        with av.open(str(path.absolute()), metadata_errors="ignore", options={"pattern_type": "none"}) as container:
            tracks = (one for one in container.streams.video if not one.disposition & Disposition.attached_pic)
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
    """Raise BrokenVideo for what PyAV decodes otherwise than it is shown."""
    if _HEIF.fullmatch(container.metadata.get("major_brand", "")):
        raise BrokenVideo("a HEIF picture; save it as PNG or JPEG")
    if {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1":
        raise BrokenVideo("transparent in parts; put it over a background first")
    described = _described(container)
    if stream.codec_context.codec_tag in _DOLBY_TAGS or _DOLBY.search(described):
        raise BrokenVideo("Dolby Vision; convert it to standard range (BT.709) first")
    if _CROPPED.search(described):
        raise BrokenVideo("its container crops the picture, which players do or do not; crop it first")


def _described(container: Any) -> str:
    """FFmpeg's description of a file; PyAV shows what belongs to a stream nowhere else, and only what it logs."""
    import av.logging

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)
    try:
        return str(container.dumps_format())
    finally:
        av.logging.set_level(level)
