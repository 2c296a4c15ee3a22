"""Pictures of an evaluation on moving digits: strips of frames, and an animated comparison of all contenders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from flcompress.moving_digits import digits

SHOWN = (2, 9, 21, 26)
"""Indices of the held-out prompts whose clips are kept for pictures: four digits, four directions."""

STRIP_SCALE, GIF_SCALE = 3, 4
GAP = 4
MARGIN = 12
ROW_LABEL, HEADER = 150, 44
STRIP_PROMPT, STRIP_LABEL = 34, 24
"""Heights of the lines of a prompt and of a contender's label in a strip."""
FRAME_MILLISECONDS, LAST_FRAME_MILLISECONDS = 110, 500
GROUND, INK, QUIET = (17, 20, 26), (236, 238, 242), (150, 156, 168)


def draw_strips(clips: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a picture of all frames of every contender, prompt by prompt.

    Args:
        clips: label of a contender -> its clips of the prompts `SHOWN` [4, 3, frames, height, width] in [-1, 1].
        path: the picture file.
    """
    _strips(clips).save(path)


def draw_animation(clips: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write an animated GIF with a row per prompt and a column per contender; `clips` as in `draw_strips`."""
    frames = [_grid(clips, frame) for frame in range(digits.FRAMES)]
    # Almost everything is grey, so few colours suffice, and the file stays small.
    still = [frame.quantize(64, dither=Image.Dither.NONE) for frame in frames]
    times = [FRAME_MILLISECONDS] * (len(still) - 1) + [LAST_FRAME_MILLISECONDS]
    still[0].save(path, save_all=True, append_images=still[1:], duration=times, loop=0, optimize=True)


def shown_prompts() -> tuple[str, ...]:
    """Return the texts of the prompts `SHOWN`."""
    known = digits.captions("heldout")
    return tuple(known[number].text for number in SHOWN)


def _strips(clips: Mapping[str, torch.Tensor]) -> Image.Image:
    """Draw a row of frames per contender, prompt by prompt, labels above the rows: readable on a narrow page too."""
    frames = digits.FRAMES
    cell = digits.HEIGHT * STRIP_SCALE
    label_height = STRIP_LABEL if any(clips) else 0
    line = label_height + cell + GAP
    block = STRIP_PROMPT + len(clips) * line + MARGIN
    canvas = Image.new("RGB", (GAP + frames * (cell + GAP), len(SHOWN) * block), GROUND)
    draw = ImageDraw.Draw(canvas)
    for row, prompt in enumerate(shown_prompts()):
        top = row * block
        draw.text((GAP, top + STRIP_PROMPT // 2), prompt, INK, _font(18), anchor="lm")
        for index, (label, shown) in enumerate(clips.items()):
            y = top + STRIP_PROMPT + index * line
            draw.text((GAP, y + label_height // 2), label, QUIET, _font(15), anchor="lm")
            for frame in range(frames):
                picture = _picture(shown[row, :, frame], STRIP_SCALE)
                canvas.paste(picture, (GAP + frame * (cell + GAP), y + label_height))
    return canvas


def _grid(clips: Mapping[str, torch.Tensor], frame: int) -> Image.Image:
    """Draw one frame of every clip: a row per prompt, a column per contender."""
    cell = digits.HEIGHT * GIF_SCALE + GAP
    canvas = Image.new("RGB", (ROW_LABEL + len(clips) * cell + MARGIN, HEADER + len(SHOWN) * cell + MARGIN), GROUND)
    draw = ImageDraw.Draw(canvas)
    for column, (label, shown) in enumerate(clips.items()):
        x = ROW_LABEL + column * cell
        middle = (x + cell // 2, HEADER // 2)
        draw.multiline_text(middle, label.replace(", ", "\n", 1), INK, _font(13), anchor="mm", align="center")
        for row in range(len(SHOWN)):
            canvas.paste(_picture(shown[row, :, frame], GIF_SCALE), (x, HEADER + row * cell))
    for row, prompt in enumerate(shown_prompts()):
        y = HEADER + row * cell + cell // 2
        draw.multiline_text((MARGIN, y), _wrap(prompt), QUIET, _font(14), anchor="lm", spacing=6)
    return canvas


def _wrap(prompt: str) -> str:
    """Break a prompt such as "a two drifting down and right, fast" into three short lines."""
    head, _, speed = prompt.partition(", ")
    digit, _, direction = head.partition(" drifting ")
    return f"{digit} drifting\n{direction},\n{speed}"


def _picture(frame: torch.Tensor, scale: int) -> Image.Image:
    """Return a frame [3, height, width] in [-1, 1] as an enlarged picture."""
    values = ((frame.clamp(-1.0, 1.0) + 1.0) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(values)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
