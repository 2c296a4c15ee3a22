"""Commands on folders of models, videos and LoRAs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.commands.recipes import StrPath

if TYPE_CHECKING:
    from flcompress.inspection.model import Inspection
    from flcompress.progress import Display


def inspect(
    model: StrPath,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    tokens: int | None = None,
) -> Inspection:
    """Return the blocks of a model's transformer, what each holds, and what removals would leave.

    Args:
        model: pipeline folder, transformer folder, `config.json`, or Hub id; its configuration is enough.
        height: clip height in pixels; the family's usual one by default, as for the other three.
        width: clip width in pixels.
        frames: number of frames.
        tokens: length of the prompt.

    Raises:
        ModelError: nothing that can be inspected.
        RequestError: a size that the model does not take.
    """
    from flcompress.inspection.model import inspect_model

    return inspect_model(os.fspath(model), height=height, width=width, frames=frames, tokens=tokens)


def encode(
    pipeline: StrPath,
    captions: StrPath,
    out: StrPath,
    *,
    videos: StrPath | None = None,
    pipeline_class: str | None = None,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    max_sequence_length: int = 512,
    negative_prompt: str = "",
    workers: int = 1,
    display: Display | None = None,
) -> dict[str, Any]:
    """Encode videos and captions, or prompts, into a dataset; an interrupted call resumes. See docs/data.md.

    Args:
        pipeline: diffusers pipeline folder that encodes.
        captions: `.jsonl` or `.csv` with file and caption; prompts without videos: `.txt`.
        out: folder of the dataset.
        videos: folder of videos; None makes a dataset of prompts only.
        pipeline_class: stock class to use the pipeline with, as `model.pipeline` of a recipe.
        frames: trim longer clips to this many frames; default: each clip's own number.
        height: resize and crop to this height, with `width`; each clip's own by default, cropped.
        width: see `height`.
        fps: frames per second to take; every frame of a video by default.
        max_sequence_length: tokens that a prompt is padded to; the recipe's `sampling` has the same.
        negative_prompt: what guidance leads away from, as in the recipe's `sampling`.
        workers: number of processes, one per GPU; processes that a launcher started share the work instead.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        A summary of the dataset: clips, prompts, skipped videos, buckets, shards, bytes. Nothing in the processes that
        are not a launcher's first.

    Raises:
        DataError: captions, videos or sizes that do not fit; a folder that holds something else.
    """
    from flcompress.data import encoding
    from flcompress.data.sizes import Target
    from flcompress.progress import default_display

    request = encoding.folder_request(
        Path(pipeline),
        Path(captions),
        Path(out),
        Path(videos) if videos is not None else None,
        Target(frames, height, width),
        max_sequence_length,
        workers,
        pipeline_class,
        fps,
        negative_prompt,
    )
    return encoding.encode_launched(request, display or default_display())


def remap_lora(lora: StrPath, pruned: StrPath, out: StrPath, *, model: StrPath | None = None) -> dict[str, Any]:
    """Fit a LoRA of the teacher to the pruned model, and write it.

    Args:
        lora: a safetensors file, or a folder as PEFT saves it.
        pruned: a run directory, an exported folder, or its `kept_blocks.json`.
        out: file, or for a folder new folder, to write.
        model: the model folder that a run started from, if it has moved.

    Returns:
        What was done: keys used, modules, blocks renumbered, modules dropped.

    Raises:
        RequestError: not such files, a LoRA for another model, or one for removed blocks alone.
    """
    from flcompress.loras import remap

    return remap.remap_lora(Path(lora), Path(pruned), Path(out), Path(model) if model is not None else None)
