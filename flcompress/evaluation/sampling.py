"""Where the clips of an evaluation are made: sampled, decoded, judged, and remembered by what decided them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flcompress.diffusion.network import Conditioning, Network, select
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
from flcompress.moving_digits.figures import motion_smoothness, moves
from flcompress.progress import ProgressSink

VERSION = 1
"""Raise it when the same weights would give other clips or judgements: it is part of the cache key."""

BATCH = 96

Judged = dict[str, torch.Tensor]
"""What `metrics.figures` reads, one row a clip, and "shown": a few clips as bytes."""


@dataclass
class Counter:
    """Tells the progress after every network evaluation."""

    progress: ProgressSink | None
    total: int
    done: int = 0

    def around(self, network: Network) -> Network:
        def call(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
            v = network(x, timestep, given)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, {})
            return v

        return call


class Studio:
    """Samples a contender on the prompts of the benchmark, or remembers what it gave."""

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
        path = self._path(contender, seed)
        return path is not None and path.exists()

    def judged(self, contender: Contender, seed: int, counter: Counter) -> Judged:
        path = self._path(contender, seed)
        if path is not None and path.exists():
            remembered: Judged = load_file(path)
            return remembered
        clips = self._clips(contender, seed, counter)
        shown = clips[list(SHOWN)]
        made = {**judge_clips(clips, self._captions), "shown": ((shown + 1.0) * 127.5).round().byte()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file({name: value.contiguous() for name, value in made.items()}, temporary)
        return made

    def _path(self, contender: Contender, seed: int) -> Path | None:
        if self._cache is None or not contender.identity:
            return None
        contract = contender.contract.to_dict()
        key = key_of(**self._decided_by, identity=contender.identity, contract=contract, seed=seed)
        return self._cache / f"{key}.safetensors"

    def _load(self, length: int, negative: str) -> tuple[Conditioning, Conditioning, torch.Size]:
        """The prompts' conditioning [n, ...], the negative prompt's [1, ...], the shape of one clip's latents."""
        prompts = digits.captions("heldout")
        given = self._parts.encode_prompts([*(caption.text for caption in prompts), negative], length)
        every = torch.arange(len(prompts)).repeat(len(self._captions) // len(prompts))
        one = torch.zeros(1, 3, digits.FRAMES, digits.HEIGHT, digits.WIDTH)
        return select(given, every), select(given, slice(-1, None)), self._parts.encode_clips(one).shape[1:]

    @torch.no_grad()
    def _clips(self, contender: Contender, seed: int, counter: Counter) -> torch.Tensor:
        contract = contender.contract
        prompts, negative, shape = self._loaded(contract.max_sequence_length, contract.negative_prompt)
        noise = torch.randn(len(self._captions), *shape, generator=generator("evaluation", "noise", seed))
        network = counter.around(contender.network)
        clips = []
        for number, first in enumerate(range(0, len(noise), BATCH)):
            some = slice(first, first + BATCH)
            again = generator("evaluation", "noise again", seed, number)
            latents = sample(network, contract, noise[some], select(prompts, some), negative, again)
            if not bool(torch.isfinite(latents).all()):
                raise FlcompressError(
                    f"{contender.name}: its latents are not finite at seed {seed}; expected numbers. Its training went "
                    "wrong: look at the losses in the report and lower learning_rate"
                )
            clips.append(self._parts.decode_latents(latents).float())
        return torch.cat(clips)


def judge_clips(clips: torch.Tensor, captions: tuple[Caption, ...]) -> Judged:
    """Judge clips [n, 3, frames, height, width] by the captions they were made for."""
    says, known = judge(_classifier(), clips), labels(captions)
    return {
        "features": says.features,
        "digit": says.digit.argmax(dim=1) == known[:, 0],
        "direction": says.direction.argmax(dim=1) == known[:, 1],
        "speed": says.speed.argmax(dim=1) == known[:, 2],
        "quality": says.quality,
        "smoothness": motion_smoothness(clips),
        "moves": moves(clips),
    }


def judged_reality(captions: tuple[Caption, ...], purpose: str, seed: int) -> Judged:
    """Real clips of held-out handwriting for these captions, judged."""
    clips = digits.render(captions, "heldout", generator("evaluation", purpose, seed))
    return judge_clips(clips, captions)


@cache
def _classifier() -> Classifier:
    return load_classifier()
