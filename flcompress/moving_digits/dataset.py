"""Encode the embedded benchmark's clips as a latent dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flcompress.data.compact import compact
from flcompress.data.encoder import clip_shard, clip_tensors, concatenate
from flcompress.data.index import NEGATIVE, ClipRecord, ClipShard, Index, PromptShard, leading_prompts, write_shard
from flcompress.draws import generator
from flcompress.models.parts import Parts
from flcompress.moving_digits import digits

_BATCH = 64

ProgressSink = Callable[[int, int, Mapping[str, float]], None]


def build_moving_digits(
    folder: Path, clips: int, parts: Parts, request: Mapping[str, Any], seed: int, progress: ProgressSink
) -> None:
    """Render `clips` training clips of the embedded benchmark and encode them.

    Args:
        folder: the dataset's folder.
        clips: number of clips.
        parts: autoencoder and text encoders of the pipeline.
        request: the index's request; "max_sequence_length" is the number of tokens of every padded prompt,
            "negative_prompt" the negative prompt of guidance, if any.
        seed: seed of the clips.
        progress: called with the number of encoded clips.
    """
    known = digits.captions("train")
    rendered, wanted = digits.sample(clips, "train", generator(seed, "moving-digits", clips))
    first = leading_prompts(request.get(NEGATIVE, ""))
    prompts = (*first, *(caption.text for caption in known))
    prompt_index = {caption: number for number, caption in enumerate(known, start=len(first))}
    texts, length = [caption.text for caption in wanted], request["max_sequence_length"]
    encoded = []
    for start in range(0, clips, _BATCH):
        batch = slice(start, start + _BATCH)
        encoded.append(clip_tensors(parts, rendered[batch], texts[batch], length))
        progress(min(start + _BATCH, clips), clips, {})
    digest, size = write_shard(folder / "clips-00000.safetensors", clip_shard(concatenate(encoded), parts.family))
    shown = tuple(ClipRecord(file=f"{number}", prompt=prompt_index[caption]) for number, caption in enumerate(wanted))
    bucket = (digits.FRAMES, digits.HEIGHT, digits.WIDTH)
    clips_shard = ClipShard(file="clips-00000.safetensors", sha256=digest, bytes=size, size=bucket, clips=shown)
    embeds = concatenate([parts.encode_prompts(prompts, length)])
    digest, size = write_shard(folder / "prompts-00000.safetensors", compact(parts.family, embeds))
    prompt_shard = PromptShard(file="prompts-00000.safetensors", sha256=digest, bytes=size, prompts=len(prompts))
    Index(request=dict(request), prompts=prompts, prompt_shards=(prompt_shard,), clip_shards=(clips_shard,)).write(
        folder
    )
