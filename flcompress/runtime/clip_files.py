"""Write a clip as an animated GIF, an MP4 video or a PNG strip of its frames."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flcompress.clip_figures import Frames
from flcompress.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

CRF = 12
"""Quality of an mp4 file that is made to be looked at."""

ENLARGED = 128
"""Pixels; clips with a side below that are for looking at: they are enlarged, pixels kept square and sharp."""
SMALLEST_SIDE = 256
"""Pixels of the shorter side that an enlarged clip has at least; the factor is a whole number."""


def check_target(out: Path) -> None:
    """Raise RequestError unless `write_clip` can write `out`: a known extension, below a folder."""
    if out.suffix.lower() not in WRITERS:
        raise RequestError(f"{out}: extension '{out.suffix}' given, expected one of {', '.join(WRITERS)}")
    if out.is_dir():
        raise RequestError(f"{out}: is a folder, expected a file name")
    above = next(parent for parent in (out.parent, *out.parent.parents) if parent.exists())
    if not above.is_dir():
        raise RequestError(f"{out}: {above} is a file, expected a folder")


def write_clip(clip: torch.Tensor, out: Path, frame_rate: float) -> Path:
    """Write a clip [3, frames, height, width] with values in [-1, 1]; the file appears whole or not at all.

    Args:
        clip: what to write.
        out: the file to write; its extension decides the format.
        frame_rate: frames a second at which it plays.
    """
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.partial{out.suffix}")
    try:
        WRITERS[out.suffix.lower()](frames_of(clip), partial, frame_rate)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def frames_of(clip: torch.Tensor) -> list[Image.Image]:
    """Return RGB pictures; see `ENLARGED`."""
    from PIL import Image

    height, width = clip.shape[-2:]
    smaller = min(height, width)
    factor = -(-SMALLEST_SIDE // smaller) if smaller < ENLARGED else 1
    size = (width * factor, height * factor)
    frames = pixels_of(clip)
    return [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]


def pixels_of(clip: torch.Tensor) -> Frames:
    """Return the frames of a clip [3, frames, height, width] with values in [-1, 1]."""
    pixels = ((clip.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def write_h264(frames: Frames, path: Path, frame_rate: float, crf: int) -> None:
    """Write an mp4 file; odd sides lose a line, since 4:2:0 colour, the kind every player reads, needs even ones.

    Args:
        frames: what to write.
        path: the file.
        frame_rate: frames a second at which it plays.
        crf: constant rate factor, lower is better and larger.
    """
    import av

    height, width = (side - side % 2 for side in frames.shape[1:3])
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), **_repeatable()}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _repeatable() -> dict[str, str]:
    """Return options of x264 with which the same frames give the same bytes.

    Its kernels for AVX-512 read memory that nothing wrote: of 40 files of the same frames half differed.
    """
    return {"x264-params": "asm=avx2"} if torch.cpu.get_capabilities().get("avx512_f") else {}


def read_picture(path: Path, height: int, width: int) -> torch.Tensor:
    """Return a picture as viewers show it, [3, height, width] in [-1, 1], scaled to cover the size and cropped.

    Raises:
        RequestError: no picture that can be read.
    """
    from PIL import Image, ImageOps

    from flcompress.data.pictures import BrokenPicture, open_picture

    try:
        fitted = ImageOps.fit(open_picture(path), (width, height), Image.Resampling.LANCZOS)
    except BrokenPicture as error:
        raise RequestError(f"{path}: {error}") from error
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0


def _gif(frames: list[Image.Image], path: Path, frame_rate: float) -> None:
    first, *others = frames
    # A GIF counts hundredths of a second: each frame ends at the one that is nearest to its time.
    ends = [round(100 * index / frame_rate) for index in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ends)]
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def _mp4(frames: list[Image.Image], path: Path, frame_rate: float) -> None:
    write_h264(np.stack([np.asarray(frame) for frame in frames]), path, frame_rate, CRF)


def _png(frames: list[Image.Image], path: Path, frame_rate: float) -> None:
    from PIL import Image

    width, height = frames[0].size
    strip = Image.new("RGB", (width * len(frames), height))
    for index, frame in enumerate(frames):
        strip.paste(frame, (index * width, 0))
    strip.save(path)


WRITERS: dict[str, Callable[[list[Image.Image], Path, float], None]] = {".gif": _gif, ".mp4": _mp4, ".png": _png}
