"""Sample, decode and judge the clips of an evaluation on moving digits, with a cache keyed by all that decides them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flcompress.diffusion.network import CallCounter, Conditioning, select
from flcompress.diffusion.sampling import sample
from flcompress.draws import generator
from flcompress.errors import FlcompressError
from flcompress.evaluation.contenders import Contender
from flcompress.evaluation.pictures import SHOWN
from flcompress.files import key_of, replacing
from flcompress.models.parts import Parts
from flcompress.models.stock_files import folder_digest
from flcompress.moving_digits import digits
from flcompress.moving_digits.classifier import FOLDER, Classifier, judge, labels, load_classifier
from flcompress.moving_digits.digits import Caption
from flcompress.moving_digits.figures import identity, motion_smoothness, moves
from flcompress.moving_digits.fixed_features import fixed_features
from flcompress.moving_digits.frames import frame_digits

VERSION = 2
"""Part of the cache key, to be raised when the same weights would give other clips or judgements."""

BATCH = 96

Judged = dict[str, torch.Tensor]
"""Input of `benchmark_figures`, one row per clip, and "shown": a few clips as bytes."""


class Studio:
    """Samples and judges contenders on the prompts of the benchmark, or reads earlier judgements from the cache."""

    def __init__(self, parts: Parts, captions: tuple[Caption, ...], cache_folder: Path | None) -> None:
        self._parts = parts
        self._captions = captions
        self._cache = cache_folder
        self._loaded = cache(self._load)
        self.batches = -(-len(captions) // BATCH)
        self._decided_by = {
            "version": VERSION,
            "prompts": [caption.text for caption in captions],
            "classifier": folder_digest(FOLDER),
            **{name: folder_digest(folder) for name, folder in parts.folders.items()},
        }

    def remembers(self, contender: Contender, seed: int) -> bool:
        """Return whether the judgement of a contender's clips is in the cache."""
        path = self._path(contender, seed)
        return path is not None and path.exists()

    def judged(self, contender: Contender, seed: int, counter: CallCounter) -> Judged:
        """Return the judgement of a contender's clips, from the cache or newly sampled."""
        path = self._path(contender, seed)
        if path is not None and path.exists():
            remembered: Judged = load_file(path)
            return remembered
        clips = self._clips(contender, seed, counter)
        shown = clips[list(SHOWN)]
        judged = {**judge_clips(clips, self._captions), "shown": ((shown + 1.0) * 127.5).round().byte()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({name: value.contiguous() for name, value in judged.items()}, temporary)
        return judged

    def _path(self, contender: Contender, seed: int) -> Path | None:
        if self._cache is None or not contender.identity:
            return None
        contract = contender.contract.to_dict()
        key = key_of(**self._decided_by, identity=contender.identity, contract=contract, seed=seed)
        return self._cache / f"{key}.safetensors"

    def _load(self, length: int, negative: str) -> tuple[Conditioning, Conditioning, torch.Size]:
        """Return conditioning of the prompts [n, ...] and the negative prompt [1, ...], and a clip's latent shape."""
        prompts = digits.captions("heldout")
        encoded = self._parts.encode_prompts([*(caption.text for caption in prompts), negative], length)
        every = torch.arange(len(prompts)).repeat(len(self._captions) // len(prompts))
        blank = torch.zeros(1, 3, digits.FRAMES, digits.HEIGHT, digits.WIDTH)
        return select(encoded, every), select(encoded, slice(-1, None)), self._parts.encode_clips(blank).shape[1:]

    @torch.no_grad()
    def _clips(self, contender: Contender, seed: int, counter: CallCounter) -> torch.Tensor:
        contract = contender.contract
        prompts, negative, shape = self._loaded(contract.max_sequence_length, contract.negative_prompt)
        noise = torch.randn(len(self._captions), *shape, generator=generator("evaluation", "noise", seed))
        network, intra = counter.around(contender.network), contender.intra
        if intra is not None:
            intra = replace(intra, weak=counter.around(intra.weak))
        clips = []
        for number, first in enumerate(range(0, len(noise), BATCH)):
            batch = slice(first, first + BATCH)
            fresh = generator("evaluation", "noise again", seed, number)
            latents = sample(network, contract, noise[batch], select(prompts, batch), negative, fresh, intra)
            if not bool(torch.isfinite(latents).all()):
                raise FlcompressError(
                    f"{contender.name}: its latents are not finite at seed {seed}; expected numbers. Its training went "
                    "wrong: look at the losses in the report and lower learning_rate"
                )
            clips.append(self._parts.decode_latents(latents).float())
        return torch.cat(clips)


def judge_clips(clips: torch.Tensor, captions: tuple[Caption, ...]) -> Judged:
    """Judge clips [n, 3, frames, height, width] by their captions."""
    judgement, known = judge(_classifier(), clips), labels(captions)
    return {
        "features": judgement.features,
        "digit": judgement.digit.argmax(dim=1) == known[:, 0],
        "direction": judgement.direction.argmax(dim=1) == known[:, 1],
        "speed": judgement.speed.argmax(dim=1) == known[:, 2],
        "quality": judgement.quality,
        "smoothness": motion_smoothness(clips),
        "moves": moves(clips),
        "identity": identity(frame_digits(_classifier(), clips)),
        "fixed_features": fixed_features(clips),
    }


def judge_real_clips(captions: tuple[Caption, ...], purpose: str, seed: int) -> Judged:
    """Judge real clips of held-out handwriting for these captions."""
    return judge_clips(_real_clips(captions, purpose, seed), captions)


def real_features(captions: tuple[Caption, ...], purpose: str, seed: int) -> Judged:
    """Return both kinds of features of real clips, and nothing else of their judgement."""
    clips = _real_clips(captions, purpose, seed)
    return {"features": judge(_classifier(), clips).features, "fixed_features": fixed_features(clips)}


def _real_clips(captions: tuple[Caption, ...], purpose: str, seed: int) -> torch.Tensor:
    return digits.render(captions, "heldout", generator("evaluation", purpose, seed))


@cache
def _classifier() -> Classifier:
    return load_classifier()
