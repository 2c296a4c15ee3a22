"""Small video files for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np


def write_video(
    path: Path,
    *,
    frames: int = 9,
    height: int = 32,
    width: int = 32,
    seed: int = 0,
    title: str = "",
    rate: Fraction | int = 8,
    ticks: Sequence[int] | None = None,
    codec: str = "libx264",
    form: str = "yuv420p",
    options: Mapping[str, str] | None = None,
    pixel: tuple[int, int] | None = None,
    gop: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A bright square that drifts over a dim picture, a pixel a frame, as H.264 in `path`'s container.

    Frames follow at `rate` a second or, where that is given, each at its own of `ticks`, of which `rate` are a second.
    `form` is the pixel format, `pixel` the shape of a pixel (width, height), `gop` the frames from one key to the next.
    """
    import av

    draw = np.random.default_rng(seed)
    ground = draw.integers(0, 80, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = ground.shape[1], ground.shape[0], form
        stream.options = dict(options or {})
        stream.metadata.update(metadata or {})
        if pixel:
            stream.codec_context.sample_aspect_ratio = Fraction(*pixel)
        if gop:
            stream.codec_context.gop_size = gop
        for number in range(frames):
            picture = ground.copy()
            picture[4:12, 2 + number : 10 + number] = 230
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (number if ticks is None else ticks[number]), 1 / Fraction(rate)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@dataclass(frozen=True)
class Tags:
    """What a video says about its colours, in numbers of ITU-T H.273; the range: 1 limited, 2 full."""

    matrix: int = 2
    primaries: int = 2
    transfer: int = 2
    range: int = 1


LUMA = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
"""Shares of red and blue in a grey, by the number of the matrix: H.273."""


def yuv(rgb: tuple[int, int, int], matrix: int, full: bool) -> tuple[int, int, int]:
    """A colour in YUV of 8 bits, by the formulas of H.273."""
    red, green, blue = (one / 255 for one in rgb)
    of_red, of_blue = LUMA[matrix]
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    differences = (blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)
    scale, shift, width = (255, 0, 255) if full else (219, 16, 224)
    return round(scale * luma + shift), *(round(width * one + 128) for one in differences)  # type: ignore[return-value]


def write_colour(
    path: Path,
    rgb: tuple[int, int, int],
    tags: Tags,
    *,
    stored_by: int | None = None,
    height: int = 32,
    width: int = 32,
    codec: str = "libx264",
    said: bool = True,
) -> Path:
    """Two frames of one colour, stored by a matrix (the tags' own), which the video says unless not `said`."""
    import av

    values = yuv(rgb, stored_by or tags.matrix, tags.range == 2)
    planes = np.stack([np.full((height, width), value, np.uint8) for value in values])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p"
        stream.options = {"qp": "0", "crf": "0", "lossless": "1"}
        names = {"colorspace": tags.matrix, "color_primaries": tags.primaries, "color_trc": tags.transfer}
        names |= {"color_range": tags.range}
        for number in range(2):
            frame = av.VideoFrame.from_ndarray(planes, format="yuv444p")
            for thing in (stream.codec_context, frame):
                for name, value in names.items() if said else ():
                    setattr(thing, name, value)
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(source: Path, path: Path, start: float, without: int = 0) -> Path:
    """A video from a second on without encoding again: packets are copied, what comes before is not to be shown.

    The first packets, as many as `without`, are not copied at all.
    """
    import av

    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = int(start / stream.time_base)
        for number, packet in enumerate(old.demux(stream)):
            if packet.dts is not None and number >= without:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return path
