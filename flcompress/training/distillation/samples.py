"""Samples of a few fixed prompts during a distillation, compared with the teacher's. Formulas in docs/health.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flcompress.clip_figures.drawn import clip_means
from flcompress.core.program import CHECKPOINTS, Program
from flcompress.core.records import DRAWN_FILE, DrawnLine
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.process import expand_to
from flcompress.diffusion.sampling import Walk, predict
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.files import append_line, replacing, write_text
from flcompress.training.watching.strips import draw_strip, reference_strip, strip_of

SHOWN = 4
"""Samples of the main process whose frames are drawn."""

TEACHER_REDRAWS = 2
"""Number of times that the teacher samples the prompts with other noises, to measure how near it is to itself."""

BEYOND = 3.0
"""Standard deviations from the teacher's mean, by channel, beyond which a value counts as saturated."""

Moments = Mapping[str, torch.Tensor]
"""What samples are compared by, fp64: "x.mean" and "x.deviation" [channels], alike for the differences "time" and
"space"; "deviation" and, of clips, "motion" [1]: means over the samples."""


@dataclass(frozen=True)
class Prompts:
    """Conditioning and noise of the fixed samples, the same at every call; every process has its share.

    Attributes:
        context: the pass's.
        conditioning: conditioning of this process's samples, on the training's device.
        negative: conditioning of the negative prompt, [1, ...].
        shape: shape of this process's latents [n, channels, frames, height, width].
        at_once: samples in one forward.
        total: samples over all processes.
        start: (noise, conditioning) -> latents that sampling starts from.
    """

    context: PassContext
    conditioning: Conditioning
    negative: Conditioning
    shape: tuple[int, ...]
    at_once: int
    total: int
    start: Callable[[torch.Tensor, Conditioning], torch.Tensor]

    @classmethod
    def choose(cls, context: PassContext, program: Program, data: LatentDataset, at_once: int) -> Prompts:
        """Choose `context.health.samples` prompts of a dataset, rounded up to a multiple of the processes."""
        size = context.world.data_size
        total = -(-context.health.samples // size) * size
        draws = _draws(context, total)
        shape, conditioning = data.conditions(total, draws.shared, program.latents, draws.mine)
        conditioning, negative = to_device(conditioning, context.device), to_device(data.negative, context.device)
        return cls(context, conditioning, negative, shape, at_once, total, program.family.start)

    @torch.no_grad()
    def sample(self, network: Network, contract: SamplingContract, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample all prompts.

        Every sample has noise of its own, so that the number of processes does not matter.

        Args:
            network: the network to sample.
            contract: the network's.
            draw: which noises: 0 for those that the teacher starts from too, or 1, 2, ... for others.

        Returns:
            Clean latents, and intermediate predictions of x0, which a critic is trained on: sample i's at level
            i modulo the number of the contract's levels. Both [n, channels, frames, height, width].
        """
        draws, levels = _draws(self.context, self.total, draw), contract.sigmas
        noises = [draws.normal(*self.shape[1:]) for _ in range(1 + len(levels) * contract.stochastic)]
        level_of = torch.arange(self.total)[draws.mine] % len(levels)
        clean, intermediate = [], []
        for first in range(0, len(draws), self.at_once):
            part = slice(first, first + self.at_once)
            conditioning = select(self.conditioning, part)
            draw_noise = _in_order([noise[part] for noise in noises])
            x = self.start(draw_noise(noises[0]).to(self.context.device), conditioning)
            seen, walk = torch.zeros_like(x), Walk(contract)
            for step, sigma in enumerate(levels):
                prediction = predict(network, contract, step, x, conditioning, self.negative)
                x0 = contract.process.tweedie(x, prediction, torch.full((len(x),), sigma, device=x.device))
                here = (level_of[part] == step).to(x.device)
                seen = torch.where(expand_to(here, x), x0, seen)
                x = walk(x, prediction, step, draw_noise)
                self.context.world.heartbeat()
            clean.append(x)
            intermediate.append(seen)
        return torch.cat(clean), torch.cat(intermediate)


class Samples:
    """A student's samples compared with its teacher's, which are made once.

    Args:
        prompts: the prompts that both sample.
        program: its autoencoder decodes the pictures.
        teacher: sampled when the first figures are asked for; the moments of its samples are kept on disk.
        contract: the teacher's.
    """

    def __init__(self, prompts: Prompts, program: Program, teacher: Network, contract: SamplingContract) -> None:
        self._prompts, self._program, self._teacher, self._contract = prompts, program, teacher, contract
        self._context = prompts.context
        self._reference: Moments | None = None
        self._teacher_redraws: list[dict[str, float]] | None = None

    def figures(self, step: int, student: Network, contract: SamplingContract) -> dict[str, float]:
        """Sample the student, draw a few, and compare; all processes together.

        Returns:
            sample_distance, sample_deviation, sample_saturation and, of clips, sample_motion.
        """
        reference = self._reference = self._reference or self._teacher_moments()
        clean, _ = self._prompts.sample(student, contract)
        self._draw(clean, strip_of(self._context.directory, step), step)
        return compare(clean, reference, self._context.world)

    def redraw_figures(self, draw: int, student: Network, contract: SamplingContract) -> dict[str, float]:
        """Return the figures of the same prompts with other noises; after `figures`, all processes together."""
        assert self._reference is not None
        clean, _ = self._prompts.sample(student, contract, draw)
        return compare(clean, self._reference, self._context.world)

    def teacher_figures(self) -> list[dict[str, float]]:
        """Return the figures of the teacher's samples with other noises; after `figures`, all processes together."""
        path, world = self._context.directory / CHECKPOINTS / "teacher-redraws.json", self._context.world
        if self._teacher_redraws is None:
            self._teacher_redraws = world.broadcast(lambda: json.loads(path.read_text()) if path.exists() else [])
        while len(self._teacher_redraws) < TEACHER_REDRAWS:
            draw = 1 + len(self._teacher_redraws)
            self._teacher_redraws.append(self.redraw_figures(draw, self._teacher, self._contract))
            if world.main:
                write_text(path, json.dumps(self._teacher_redraws) + "\n")
        return self._teacher_redraws

    def _draw(self, clean: torch.Tensor, path: Path, step: int | None) -> None:
        """Draw a few samples and note how they look; of a step, or of the teacher.

        What is seen on the main process's few clips, in whole steps of colour, depends on how many processes there are,
        so it is shown, and decides nothing.
        """
        if not self._context.world.main:
            return
        clips = draw_strip(self._context, self._program, clean[:SHOWN], path)
        self._context.world.heartbeat()
        if clips:
            line = DrawnLine(step=step, **clip_means(clips)).line()
            append_line(self._context.directory / DRAWN_FILE, line)
            self._context.world.heartbeat()

    def _teacher_moments(self) -> Moments:
        """Return the teacher's moments: those stored by an earlier start of this training, or of samples made now."""
        path, world = self._context.directory / CHECKPOINTS / "teacher.safetensors", self._context.world
        if world.broadcast(path.exists):
            stored: Moments = load_file(str(path))
            return stored
        clean, _ = self._prompts.sample(self._teacher, self._contract)
        teacher_moments = moments(clean, world)
        self._draw(clean, reference_strip(self._context.directory), None)
        if world.main:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(dict(teacher_moments), str(temporary))
        return teacher_moments


def moments(latents: torch.Tensor, world: World) -> Moments:
    """Return the moments of all processes' samples [n, channels, frames, height, width]; see `Moments`."""
    sums: dict[str, torch.Tensor] = {}
    for view, parts in _views(latents).items():
        flat = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        count = torch.full((1,), float(flat.shape[1]), dtype=torch.float64, device=flat.device)
        sums |= {f"{view}.sum": flat.sum(1), f"{view}.square": flat.square().sum(1), f"{view}.count": count}
    x = latents.double()
    sums["deviation"] = x.flatten(1).std(dim=1).mean().reshape(1)
    if latents.shape[2] > 1:
        sums["motion"] = x.diff(dim=2).abs().mean().reshape(1)
    agreed = _process_mean(sums, world)
    result = {name: value for name, value in agreed.items() if "." not in name}
    for view in _views(latents):
        mean, square = (agreed[f"{view}.{name}"] / agreed[f"{view}.count"] for name in ("sum", "square"))
        result |= {f"{view}.mean": mean, f"{view}.deviation": (square - mean.square()).clamp(min=0.0).sqrt()}
    return result


def compare(latents: torch.Tensor, reference: Moments, world: World) -> dict[str, float]:
    """Return the figures of samples against the moments of the teacher's; see docs/health.md."""
    ours = moments(latents, world)
    distances = []
    for view in (name.removesuffix(".mean") for name in reference if name.endswith(".mean")):
        mean, deviation = (ours[f"{view}.{name}"] - reference[f"{view}.{name}"] for name in ("mean", "deviation"))
        distances.append((mean.square() + deviation.square()) / reference[f"{view}.deviation"].square())
    middle, width = (
        reference[f"x.{name}"].to(latents.device).reshape(1, -1, 1, 1, 1) for name in ("mean", "deviation")
    )
    beyond = ((latents.double() - middle).abs() > BEYOND * width).double().mean().reshape(1)
    figures = {
        "sample_distance": float(torch.cat(distances).mean()),
        "sample_deviation": float(ours["deviation"] / reference["deviation"]),
        "sample_saturation": float(_process_mean({"share": beyond}, world)["share"]),
    }
    if "motion" in reference:
        figures["sample_motion"] = float(ours["motion"] / reference["motion"])
    return figures


def _views(latents: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Return the values and their differences over space and, of clips, over time."""
    x = latents.double()
    views = {"x": [x], "space": [x.diff(dim=3), x.diff(dim=4)]}
    return views | {"time": [x.diff(dim=2)]} if latents.shape[2] > 1 else views


def _process_mean(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """Return the mean of each tensor [n] over the processes, on the CPU; the host waits for the GPU once."""
    keys = [f"{name} {i}" for name, value in tensors.items() for i in range(len(value))]
    mean = world.all_mean(dict(zip(keys, torch.cat(list(tensors.values())).tolist(), strict=True)))
    return {
        name: torch.tensor([mean[f"{name} {i}"] for i in range(len(value))], dtype=torch.float64)
        for name, value in tensors.items()
    }


def _in_order(noises: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    source = iter(noises)
    return lambda like: next(source)


def _draws(context: PassContext, total: int, draw: int = 0) -> Draws:
    parts = (context.seed, "health", "samples", *([draw] if draw else []))
    return Draws(*parts, batch=total, rank=context.world.data_rank, processes=context.world.data_size)
