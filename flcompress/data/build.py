"""A recipe's `data:` to a latent dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flcompress.data import moving_digits
from flcompress.data.latents import LatentDataset
from flcompress.data.videos import check_sizes, decode_video, list_videos
from flcompress.diffusion.conditioning import taken
from flcompress.diffusion.contract import SamplingContract
from flcompress.draws import generator
from flcompress.models.parts import Parts

_BATCH = 64

ProgressSink = Callable[[int, int, Mapping[str, float]], None]


def check_dataset(spec: Mapping[str, Any]) -> None:
    """Raise DataError for anything wrong with a recipe's data that can be known before encoding."""
    ((kind, given),) = spec.items()
    if kind == "latents":
        LatentDataset.load(Path(given))
    elif kind == "videos":
        check_sizes(list_videos(Path(given["folder"]), Path(given["captions"])))


def build_dataset(
    spec: Mapping[str, Any],
    parts: Parts,
    contract: SamplingContract,
    seed: int,
    progress: ProgressSink,
) -> LatentDataset:
    """Clips and captions as latents.

    Args:
        spec: one of {"moving-digits": {"clips": n}}, {"latents": folder}, {"videos": {"folder", "captions"}}.
        parts: autoencoder and text encoders of the pipeline.
        contract: says how long prompts are padded.
        seed: of the rendered clips.
        progress: told how many clips are encoded.

    Raises:
        DataError: no clips, mixed sizes, damaged or non-finite numbers.
    """
    ((kind, given),) = spec.items()
    length = contract.max_sequence_length
    if kind == "latents":
        return LatentDataset.load(Path(given))
    if kind == "moving-digits":
        return build_moving_digits(given["clips"], parts, length, seed, progress)
    videos = list_videos(Path(given["folder"]), Path(given["captions"]))
    check_sizes(videos)
    texts = sorted({video.caption for video in videos})
    clips = torch.stack([decode_video(video.path) for video in videos])
    return encode_dataset(clips, [texts.index(video.caption) for video in videos], texts, parts, length, progress)


def build_moving_digits(
    clips: int, parts: Parts, max_sequence_length: int, seed: int, progress: ProgressSink
) -> LatentDataset:
    """Render `clips` training clips of the embedded benchmark and encode them."""
    known = moving_digits.captions("train")
    place = {caption: number for number, caption in enumerate(known)}
    draw = generator(seed, "moving-digits", clips)
    rendered, wanted = moving_digits.sample(clips, "train", draw)
    texts = [caption.text for caption in known]
    index = [place[caption] for caption in wanted]
    return encode_dataset(rendered, index, texts, parts, max_sequence_length, progress)


def encode_dataset(
    clips: torch.Tensor,
    prompt_index: Sequence[int],
    captions: Sequence[str],
    parts: Parts,
    max_sequence_length: int,
    progress: ProgressSink,
) -> LatentDataset:
    """Encode clips [n, 3, frames, height, width] in [-1, 1] and their captions with a pipeline's own parts."""
    latents, frames = [], []
    for some in torch.split(clips, _BATCH):
        made, first = parts.encode_clips(some)
        latents.append(made)
        frames.append(first)
        progress(sum(map(len, latents)), len(clips), {})
    prompts = parts.encode_prompts([*captions, ""], max_sequence_length)
    dataset = LatentDataset(
        torch.cat(latents),
        torch.tensor(prompt_index),
        {name: one.clone() for name, one in taken(prompts, slice(0, -1)).items()},
        {name: one.clone() for name, one in taken(prompts, slice(-1, None)).items()},
        tuple(captions),
        {name: torch.cat([one[name] for one in frames]) for name in frames[0]},
    )
    dataset.check("data")
    return dataset
