"""The figures of the suite `proxies` on clips of known motion and damage: `python -m docs.measurements.proxies`.

Prints the table of docs/benchmarks/proxies.md: the plain clip's figures, and for each damage what became of them.
"""

from __future__ import annotations

import numpy as np
import torch

from flcompress.evaluation.suites.clip_suite import ClipContext
from flcompress.evaluation.suites.proxies import Proxies
from flcompress.runtime.clip_folder import Frames
from tests.fixtures.synthetic_clips import VARIANTS, moving

FIGURES = (
    "flow",
    "proxy_smoothness",
    "flicker",
    "saturation",
    "contrast",
    "sharpness",
    "noise",
    "first_frame_ssim",
    "first_frame_decay",
)


def encode(frames: Frames) -> torch.Tensor:
    return torch.from_numpy(frames[None].astype(np.float32)).permute(0, 4, 1, 2, 3)


def main() -> None:
    clips = {"plain": moving(), **{name: make() for name, make in VARIANTS.items()}}
    print("| clip | " + " | ".join(f"`{key}`" for key in FIGURES) + " |")
    print("|---" * (1 + len(FIGURES)) + "|")
    for name, clip in clips.items():
        context = ClipContext(frame_rate=8.0, encode=encode, image=moving()[0])
        figures = Proxies().measure(clip, context).figures
        print(f"| {name} | " + " | ".join(f"{figures[key]:.4g}" for key in FIGURES) + " |")


if __name__ == "__main__":
    main()
