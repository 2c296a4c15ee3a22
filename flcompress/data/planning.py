"""Who goes into which shard of a latent dataset, decided before anything is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flcompress.data.captions import Captioned
from flcompress.data.encoder import ClipTask, PromptTask, Skipped
from flcompress.data.index import Clip, leading
from flcompress.data.sizes import Size, Target
from flcompress.data.video_names import in_utf8
from flcompress.models.latent_size import Grid

PROMPTS_A_SHARD = 16
CLIPS_A_SHARD = 1024
PIXELS_A_SHARD = 1 << 28
"""Eight clips of 81 x 480 x 832, some 64 MB of latents; an interruption costs at most one shard a process."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be made. It follows from the files and the request alone, so every process and every resumption
    makes the same shards.

    Attributes:
        prompts: each text once; the first is the empty prompt, the second the negative one where there is one.
        tasks: shards of prompts, then shards of clips.
        skipped: videos left out already.
    """

    prompts: tuple[str, ...]
    tasks: tuple[PromptTask | ClipTask, ...]
    skipped: tuple[Skipped, ...] = ()


def plan_prompts(texts: Sequence[str], negative_prompt: str = "") -> Plan:
    """A dataset of prompts only."""
    prompts = tuple(dict.fromkeys([*leading(negative_prompt), *texts]))
    return Plan(prompts, _prompt_tasks(prompts))


def plan_clips(
    captioned: Sequence[Captioned],
    measured: Mapping[str, Size | Skipped],
    uncaptioned: Sequence[str],
    target: Target,
    grid: Grid,
    negative_prompt: str = "",
) -> Plan:
    """A dataset of clips: those of one bucket share shards, in the order of the captions file.

    Args:
        captioned: videos and their texts.
        measured: each video's own size, or why it has none.
        uncaptioned: videos without a text, which are left out.
        target: the size wanted.
        grid: the sizes that the model takes.
        negative_prompt: what guidance leads away from.
    """
    skipped = [Skipped(in_utf8(file), "no caption names it") for file in uncaptioned]
    chosen: dict[Size, list[Captioned]] = {}
    for one in captioned:
        size = measured[one.file]
        bucket = size if isinstance(size, Skipped) else target.bucket(size, grid)
        if isinstance(bucket, Skipped):
            skipped.append(bucket)
        elif bucket is None:
            skipped.append(Skipped(one.file, f"smaller than the smallest size, {grid.pixels} x {grid.pixels}"))
        else:
            chosen.setdefault(bucket, []).append(one)
    said = (one.caption for members in chosen.values() for one in members)
    prompts = tuple(dict.fromkeys([*leading(negative_prompt), *said]))
    place = {text: number for number, text in enumerate(prompts)}
    groups = []
    for bucket in sorted(chosen):
        members = [Clip(file=one.file, prompt=place[one.caption]) for one in chosen[bucket]]
        frames, height, width = bucket
        most = max(1, min(CLIPS_A_SHARD, PIXELS_A_SHARD // (frames * height * width)))
        groups += [(bucket, tuple(members[start : start + most])) for start in range(0, len(members), most)]
    clips = tuple(
        ClipTask(f"clips-{number:05d}.safetensors", bucket, members, tuple(prompts[one.prompt] for one in members))
        for number, (bucket, members) in enumerate(groups)
    )
    return Plan(prompts, (*_prompt_tasks(prompts), *clips), tuple(skipped))


def _prompt_tasks(prompts: tuple[str, ...]) -> tuple[PromptTask, ...]:
    starts = range(0, len(prompts), PROMPTS_A_SHARD)
    return tuple(
        PromptTask(f"prompts-{number:05d}.safetensors", prompts[start : start + PROMPTS_A_SHARD])
        for number, start in enumerate(starts)
    )
