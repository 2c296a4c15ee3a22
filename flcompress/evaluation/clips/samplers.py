"""Who makes the clips: the contenders of a run, by the house's own sampler, from the same noises."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from flcompress.clip_figures import Frames
from flcompress.core.backend import Backend
from flcompress.core.program import Program
from flcompress.diffusion.network import CallCounter, Conditioning, select, to_device
from flcompress.diffusion.sampling import sample
from flcompress.draws import seed_of
from flcompress.driver.clips import data_frame_rate
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError
from flcompress.evaluation.contenders import Contender, run_contenders
from flcompress.models.configs import check_transformer_config
from flcompress.models.parts import Parts
from flcompress.models.stock_files import folder_digest
from flcompress.progress import ProgressSink
from flcompress.runtime.clip_files import read_picture
from flcompress.runtime.clip_folder import Item
from flcompress.runtime.sizes import clip_of

ENCODED = 8
"""Prompts that the text encoders take at once."""


class Maker(Protocol):
    """A model that makes clips.

    Attributes:
        name: short name in tables and folders.
        label: name for readers.
        identity: plain data that decide its clips, for the name of their folder.
        steps: network calls along a sampling path.
        guidance: guidance scale.
        evaluations: network evaluations of one clip.
        parameters: parameters that take part in one.
        frame_rate: frames a second of its clips.
        decoding_seconds: what decoding its last clip took; None where that is not known.
    """

    name: str
    label: str
    identity: Any
    steps: int
    guidance: float
    evaluations: int
    parameters: int
    frame_rate: float
    decoding_seconds: float | None

    @property
    def home(self) -> object:
        """What it shares memory with; makers of another home are released first."""

    def prepare(self, items: Sequence[Item]) -> None:
        """Encode what the clips of these items need, so that text encoders and denoiser come in turn."""

    def clip(self, item: Item, seed: int, number: int, count: ProgressSink) -> torch.Tensor | Frames:
        """Return a clip [3, frames, height, width] in [-1, 1], or its frames."""

    def release(self) -> None:
        """Free the memory of what it loaded."""


def noise_seed(item: Item, seed: int, number: int) -> int:
    """Return the seed of a clip's noise, which every model that is compared starts from."""
    return seed_of("evaluation", "clip", item.key, seed, number)


class Home:
    """What the contenders of one run share: text encoders, autoencoder, size, encoded prompts."""

    def __init__(self, run: RunDirectory, device: str) -> None:
        program = run.final()
        self.program: Program = replace(program, frame_rate=data_frame_rate(run.recipe()))
        self.device = device
        self.parts: Parts = program.parts(device)
        self._encoded: dict[tuple[str, int], Conditioning] = {}
        self._negative: dict[tuple[str, int], Conditioning] = {}

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the clips in pixels."""
        clip = clip_of(self.program)
        return clip.num_frames, clip.height, clip.width

    @cached_property
    def frame_rate(self) -> float:
        """Frames a second: those of the run's data, or of the model's family."""
        if self.program.frame_rate is not None:
            return self.program.frame_rate
        config = check_transformer_config(self.program.components["transformer"])
        return self.program.family.frame_rate(self.program.index, config)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the clips besides the transformers."""
        digests = {name: folder_digest(folder) for name, folder in self.parts.folders.items()}
        return {"parts": digests, "latents": list(self.program.latents), "frame_rate": self.frame_rate}

    def encode(self, items: Sequence[Item], negative: str, length: int) -> None:
        """Encode prompts and first frames that are not encoded yet; the text encoders leave memory afterwards."""
        missing = [item for item in items if (item.key, length) not in self._encoded]
        for start in range(0, len(missing), ENCODED):
            batch = missing[start : start + ENCODED]
            encoded = to_device(self.parts.encode_prompts([item.prompt for item in batch], length), "cpu")
            for index, item in enumerate(batch):
                own = select(encoded, slice(index, index + 1))
                self._encoded[item.key, length] = {**own, **self._first_frame(item, length)}
        if (negative, length) not in self._negative:
            self._negative[negative, length] = to_device(self.parts.encode_prompts([negative], length), "cpu")
        if missing:
            self.parts.let_go()

    def conditioning(self, item: Item, negative: str, length: int) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning of an item and of the negative prompt."""
        self.encode([item], negative, length)
        return self._encoded[item.key, length], self._negative[negative, length]

    def _first_frame(self, item: Item, length: int) -> Conditioning:
        if item.image is None:
            return {}
        frames, height, width = self.size
        clip = read_picture(item.image, height, width)[None, :, None].expand(1, -1, frames, -1, -1)
        return to_device(self.parts.encode_images(clip, [item.prompt], length), "cpu")


class ProgramMaker:
    """A contender of a run."""

    def __init__(self, contender: Contender, home: Home) -> None:
        contract = contender.contract
        self.name, self.label, self.parameters = contender.name, contender.label, contender.parameters
        self.steps, self.guidance = contract.num_inference_steps, contract.guidance_scale
        self.evaluations, self.frame_rate = contender.evaluations, home.frame_rate
        self.identity = {"network": contender.identity, "contract": contract.to_dict(), **home.identity}
        self._contender, self._home, self.home = contender, home, home
        self.decoding_seconds: float | None = None

    def prepare(self, items: Sequence[Item]) -> None:
        """Encode prompts and first frames."""
        contract = self._contender.contract
        self._home.encode(items, contract.negative_prompt, contract.max_sequence_length)

    @torch.no_grad()
    def clip(self, item: Item, seed: int, number: int, count: ProgressSink) -> torch.Tensor:
        """Sample and decode; noise and re-noising are drawn as a stock pipeline draws them."""
        contract, home = self._contender.contract, self._home
        parts, family = home.parts, home.program.family
        given, negative = home.conditioning(item, contract.negative_prompt, contract.max_sequence_length)
        draw = torch.Generator().manual_seed(noise_seed(item, seed, number))
        start = family.start(family.noise(home.program.latents, draw), given)
        counter = CallCounter(count, self.evaluations)
        network, intra = counter.around(self._contender.network), self._contender.intra
        if intra is not None:
            intra = replace(intra, weak=counter.around(intra.weak))
        latents = sample(network, contract, start, given, negative, draw, intra)
        if not bool(torch.isfinite(latents).all()):
            raise FlcompressError(
                f"{self.name}: its latents are not finite for {item.prompt[:60]!r} at seed {seed}; expected numbers. "
                "Its training went wrong: look at the losses in the report and lower learning_rate"
            )
        began = time.monotonic()
        clip = parts.decode_latents(family.end(parts.config, latents, given))[0].float().cpu()
        self.decoding_seconds = round(time.monotonic() - began, 3)
        return clip

    def release(self) -> None:
        """Free the transformers and the autoencoder."""
        self._contender.release()
        self._home.parts.let_go()


def makers_of(
    run: RunDirectory,
    home: Home,
    backends: Sequence[Backend] = (),
    guidances: Sequence[tuple[float, float]] = (),
    frame_local: float | None = None,
    *,
    stages: bool = True,
) -> list[Maker]:
    """Return the contenders of a run, in the order of the tables."""
    contenders = run_contenders(run, home.device, backends, guidances, frame_local, stages=stages)
    return [ProgramMaker(contender, home) for contender in contenders]


def student_of(path: Path, home: Home, names: Sequence[str]) -> Maker:
    """Return the student of another run, or its teacher if it has none, under a name that is free."""
    run = RunDirectory(path)
    other = Home(run, home.device)
    if other.size != home.size:
        sizes = [" x ".join(map(str, size)) for size in (other.size, home.size)]
        raise FlcompressError(f"--against: {path} is sampled at {sizes[0]}, this run at {sizes[1]}; expected one size")
    contenders = run_contenders(run, home.device)
    contender = next((each for each in contenders if each.name == "student"), contenders[0])
    name = next(name for name in (run.name, *(f"{run.name}-{n}" for n in range(2, 99))) if name not in names)
    return ProgramMaker(replace(contender, name=name, label=f"{run.name}: {contender.label}"), other)
