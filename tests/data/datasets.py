"""Latent datasets with numbers that tell which clip and prompt they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from flcompress.data.index import LATENTS, PER_CLIP, ClipRecord, ClipShard, Index, PromptShard, write_shard
from flcompress.data.sizes import Size

PROMPTS = ("", "one", "two", "three")


def write_dataset(folder: Path, buckets: Mapping[Size, int], *, a_shard: int = 3, first_frame: bool = False) -> Path:
    """ClipRecord n (counted over all buckets) has latents that are n everywhere and prompt 1 + n % 3; prompt p is p."""
    folder.mkdir(parents=True)
    prompts = []
    for place, numbers in enumerate(([0, 1, 2], [3])):
        values = torch.tensor(numbers).float()
        tensors = {"encoder_hidden_states": values[:, None, None].repeat(1, 4, 8), "mask": values[:, None].long()}
        file = f"prompts-{place:05d}.safetensors"
        digest, size = write_shard(folder / file, tensors)
        prompts.append(PromptShard(file=file, sha256=digest, bytes=size, prompts=len(numbers)))
    clips: list[ClipShard] = []
    number = 0
    for bucket, count in buckets.items():
        for start in range(number, number + count, a_shard):
            numbers = list(range(start, min(start + a_shard, number + count)))
            values = torch.tensor(numbers).float()
            frames, height, width = bucket
            shape = (len(numbers), 2, (frames - 1) // 4 + 1, height // 8, width // 8)
            tensors = {LATENTS: values.reshape(-1, 1, 1, 1, 1).expand(shape)}
            if first_frame:
                tensors[PER_CLIP + "first_frame"] = -values[:, None]
            file = f"clips-{len(clips):05d}.safetensors"
            digest, size = write_shard(folder / file, tensors)
            members = tuple(ClipRecord(file=f"{n}.mp4", prompt=1 + n % 3) for n in numbers)
            clips.append(ClipShard(file=file, sha256=digest, bytes=size, size=bucket, clips=members))
        number += count
    Index(prompts=PROMPTS, prompt_shards=tuple(prompts), clip_shards=tuple(clips)).write(folder)
    return folder
