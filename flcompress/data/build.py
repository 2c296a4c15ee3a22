"""A recipe's `data:` to a latent dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flcompress.data import moving_digits
from flcompress.data.latents import LatentDataset
from flcompress.data.videos import check_sizes, decode_video, list_videos
from flcompress.diffusion.contract import SamplingContract
from flcompress.draws import generator
from flcompress.models.loading import load_text, load_vae
from flcompress.models.text import encode_prompts
from flcompress.models.video import encode_clips

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
    components: Mapping[str, Path],
    contract: SamplingContract,
    seed: int,
    progress: ProgressSink,
) -> LatentDataset:
    """Clips and captions as latents.

    Args:
        spec: one of {"moving-digits": {"clips": n}}, {"latents": folder}, {"videos": {"folder", "captions"}}.
        components: folders of the autoencoder, the text encoder and the tokenizer.
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
        return build_moving_digits(given["clips"], components, length, seed, progress)
    videos = list_videos(Path(given["folder"]), Path(given["captions"]))
    check_sizes(videos)
    texts = sorted({video.caption for video in videos})
    clips = torch.stack([decode_video(video.path) for video in videos])
    return encode_dataset(clips, [texts.index(video.caption) for video in videos], texts, components, length, progress)


def build_moving_digits(
    clips: int, components: Mapping[str, Path], max_sequence_length: int, seed: int, progress: ProgressSink
) -> LatentDataset:
    """Render `clips` training clips of the embedded benchmark and encode them."""
    known = moving_digits.captions("train")
    place = {caption: number for number, caption in enumerate(known)}
    draw = generator(seed, "moving-digits", clips)
    rendered, wanted = moving_digits.sample(clips, "train", draw)
    texts = [caption.text for caption in known]
    index = [place[caption] for caption in wanted]
    return encode_dataset(rendered, index, texts, components, max_sequence_length, progress)


def encode_dataset(
    clips: torch.Tensor,
    prompt_index: Sequence[int],
    captions: Sequence[str],
    components: Mapping[str, Path],
    max_sequence_length: int,
    progress: ProgressSink,
) -> LatentDataset:
    """Encode clips [n, 3, frames, height, width] in [-1, 1] and their captions with a pipeline's own parts."""
    vae = load_vae(components["vae"])
    latents = []
    for part in torch.split(clips, _BATCH):
        latents.append(encode_clips(vae, part))
        progress(sum(map(len, latents)), len(clips), {})
    embeds = embed_captions([*captions, ""], components, max_sequence_length)
    made = LatentDataset(
        torch.cat(latents), torch.tensor(prompt_index), embeds[:-1].clone(), embeds[-1].clone(), tuple(captions)
    )
    made.check("data")
    return made


def embed_captions(captions: Sequence[str], components: Mapping[str, Path], max_sequence_length: int) -> torch.Tensor:
    """Prompt embeddings [captions, tokens, channels]."""
    encoder, tokenizer = load_text(components["text_encoder"], components["tokenizer"])
    return encode_prompts(encoder, tokenizer, captions, max_sequence_length)
