"""Draw sample clips of a training as pictures: a row of frames per clip, decoded by the pipeline's autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flcompress.clip_figures import Frames
from flcompress.clip_figures.drawn import reduced
from flcompress.core.program import Program
from flcompress.core.steps import PassContext
from flcompress.files import replacing
from flcompress.models.tensor_memory import free_gpu_memory

STRIPS = "samples"
FRAMES, ROW_HEIGHT, GAP = 6, 80, 2
"""Frames shown of a clip, evenly spread; their greatest height in pixels; pixels between them."""
GROUND = (17, 20, 26)


def strip_of(directory: Path, step: int) -> Path:
    """Return the path of the strip of a step's samples in the pass's folder."""
    return directory / STRIPS / f"step-{step:08d}.png"


def reference_strip(directory: Path) -> Path:
    """Return the path of the strip of the teacher's samples."""
    return directory / STRIPS / "teacher.png"


def draw_strip(context: PassContext, program: Program, latents: torch.Tensor, path: Path) -> list[Frames]:
    """Decode clips [n, channels, frames, height, width], one at a time, and write them as rows of frames.

    Returns:
        The clips, reduced in size; none where they could not be drawn.

    The autoencoder is in memory only while this lasts. A failure to draw does not end the training: it is reported, and
    the training continues without the picture.
    """
    free_gpu_memory()
    clips: list[Frames] = []
    try:
        clips = _draw(program, latents, path, context.device)
    except Exception as error:  # noqa: BLE001 (whatever it was)
        reason = " ".join(str(error).split())[:300]
        context.say(f"warning: {path.name}: not drawn, the training continues: {type(error).__name__}: {reason}")
    free_gpu_memory()
    return clips


def _draw(program: Program, latents: torch.Tensor, path: Path, device: str) -> list[Frames]:
    from PIL import Image

    # Half precision is enough for pictures of this size, and takes half the memory next to a training.
    parts, rows, clips = program.parts(device, torch.bfloat16 if device == "cuda" else None), [], []
    for sample in latents:
        clip = parts.decode_latents(sample[None].float())[0].float().cpu()
        values = ((clip.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().numpy()
        clips.append(reduced(values))
        frames = torch.linspace(0, len(values) - 1, min(FRAMES, len(values))).round().long().tolist()
        rows.append([_small(Image.fromarray(values[frame])) for frame in frames])
    width, height = rows[0][0].size
    canvas = Image.new("RGB", (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), GROUND)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            canvas.paste(picture, (x * (width + GAP), y * (height + GAP)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        canvas.save(temporary, format="png", optimize=True)
    return clips


def _small(picture: Any) -> Any:
    if picture.height > ROW_HEIGHT:
        return picture.resize((round(picture.width * ROW_HEIGHT / picture.height), ROW_HEIGHT))
    return picture
