"""Assign clips and prompts to the shards of a latent dataset, before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flcompress.data.captions import CaptionedVideo
from flcompress.data.encoder import ClipTask, PromptTask, Skipped
from flcompress.data.index import ClipRecord, leading_prompts
from flcompress.data.sizes import Size, Target
from flcompress.data.video_names import in_utf8
from flcompress.models.latent_size import Grid

PROMPTS_A_SHARD = 16
CLIPS_A_SHARD = 1024
PIXELS_A_SHARD = 1 << 28
"""Eight clips of 81 x 480 x 832, about 64 MB of latents; an interruption costs each process at most one shard."""


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """Plan of a dataset's shards.

    It depends on the files and the request alone, so every process and every resumption encodes the same shards.

    Attributes:
        prompts: distinct texts; the first is empty, the second the negative prompt if there is one.
        tasks: shards of prompts, then shards of clips.
        skipped: videos that are skipped before encoding.
    """

    prompts: tuple[str, ...]
    tasks: tuple[PromptTask | ClipTask, ...]
    skipped: tuple[Skipped, ...] = ()


def plan_prompts(texts: Sequence[str], negative_prompt: str = "") -> DatasetPlan:
    """Plan a dataset of prompts only."""
    prompts = tuple(dict.fromkeys([*leading_prompts(negative_prompt), *texts]))
    return DatasetPlan(prompts, _prompt_tasks(prompts))


def plan_clips(
    captioned: Sequence[CaptionedVideo],
    measured: Mapping[str, Size | Skipped],
    uncaptioned: Sequence[str],
    target: Target,
    grid: Grid,
    negative_prompt: str = "",
) -> DatasetPlan:
    """Plan a dataset of clips: those of one bucket share shards, in the order of the captions file.

    Args:
        captioned: videos and their captions.
        measured: each video's own size, or the reason why it has none.
        uncaptioned: videos without a caption, which are skipped.
        target: requested size.
        grid: sizes that the model accepts.
        negative_prompt: negative prompt of guidance.
    """
    skipped = [Skipped(in_utf8(file), "no caption names it") for file in uncaptioned]
    chosen: dict[Size, list[CaptionedVideo]] = {}
    for clip in captioned:
        size = measured[clip.file]
        bucket = size if isinstance(size, Skipped) else target.bucket(size, grid)
        if isinstance(bucket, Skipped):
            skipped.append(bucket)
        elif bucket is None:
            skipped.append(Skipped(clip.file, f"smaller than the smallest size, {grid.pixels} x {grid.pixels}"))
        else:
            chosen.setdefault(bucket, []).append(clip)
    captions = (clip.caption for members in chosen.values() for clip in members)
    prompts = tuple(dict.fromkeys([*leading_prompts(negative_prompt), *captions]))
    numbers = {text: number for number, text in enumerate(prompts)}
    groups = []
    for bucket in sorted(chosen):
        members = [ClipRecord(file=clip.file, prompt=numbers[clip.caption]) for clip in chosen[bucket]]
        frames, height, width = bucket
        limit = max(1, min(CLIPS_A_SHARD, PIXELS_A_SHARD // (frames * height * width)))
        groups += [(bucket, tuple(members[start : start + limit])) for start in range(0, len(members), limit)]
    clips = tuple(
        ClipTask(f"clips-{number:05d}.safetensors", bucket, members, tuple(prompts[clip.prompt] for clip in members))
        for number, (bucket, members) in enumerate(groups)
    )
    return DatasetPlan(prompts, (*_prompt_tasks(prompts), *clips), tuple(skipped))


def _prompt_tasks(prompts: tuple[str, ...]) -> tuple[PromptTask, ...]:
    starts = range(0, len(prompts), PROMPTS_A_SHARD)
    return tuple(
        PromptTask(f"prompts-{number:05d}.safetensors", prompts[start : start + PROMPTS_A_SHARD])
        for number, start in enumerate(starts)
    )
