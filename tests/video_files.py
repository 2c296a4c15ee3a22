"""Small video files for tests."""

from __future__ import annotations

from collections.abc import Sequence
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
) -> Path:
    """A bright square that drifts over a dim picture, a pixel a frame, as H.264 in `path`'s container.

    Frames follow at `rate` a second or, where that is given, each at its own of `ticks`, of which `rate` are a second.
    """
    import av

    draw = np.random.default_rng(seed)
    ground = draw.integers(0, 80, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = ground.shape[1], ground.shape[0], "yuv420p"
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
