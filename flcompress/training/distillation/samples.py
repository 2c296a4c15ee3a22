"""Samples of a few fixed prompts while a student is trained, held against the teacher's. Formulas in docs/health.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file

from flcompress.core.program import CHECKPOINTS, Program
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.process import expand_to
from flcompress.diffusion.sampling import Walk, predict
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.files import replacing, write_text
from flcompress.training.watching.strips import draw_strip, reference_strip, strip_of

SHOWN = 4
"""Of the main process's samples, those whose frames are drawn."""

TEACHER_REDRAWS = 2
"""How often the teacher samples the prompts again with other noises: how near it is to itself."""

BEYOND = 3.0
"""The teacher's deviations from its mean, channel by channel, from which on a value counts as saturated."""

Moments = Mapping[str, torch.Tensor]
"""What samples are compared by, fp64: "x.mean" and "x.deviation" [channels], alike for the differences "time" and
"space"; "deviation" and, of clips, "motion" [1]: means over the samples."""


@dataclass(frozen=True)
class Prompts:
    """What the samples are made from, the same at every call; every process has its share.

    Attributes:
        work: of the pass.
        given: conditioning of this process's samples, on the training's device.
        negative: of the negative prompt, [1, ...].
        shape: of this process's latents [n, channels, frames, height, width].
        at_once: samples in one forward.
        total: samples over all processes.
        start: (noise, conditioning) -> latents that sampling starts from.
    """

    work: PassContext
    given: Conditioning
    negative: Conditioning
    shape: tuple[int, ...]
    at_once: int
    total: int
    start: Callable[[torch.Tensor, Conditioning], torch.Tensor]

    @classmethod
    def of(cls, work: PassContext, program: Program, data: LatentDataset, at_once: int) -> Prompts:
        """`work.health.samples` prompts of a dataset, or a few more where the processes do not divide that number."""
        size = work.world.size
        total = -(-work.health.samples // size) * size
        draws = _draws(work, total)
        shape, given = data.conditions(total, draws.shared, program.latents, draws.mine)
        given, negative = to_device(given, work.device), to_device(data.negative, work.device)
        return cls(work, given, negative, shape, at_once, total, program.family.start)

    @torch.no_grad()
    def sampled(self, network: Network, contract: SamplingContract, draw: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Sample them all.

        Every sample has noise of its own, so that it does not matter how many processes there are.

        Args:
            network: what predicts.
            contract: the network's.
            draw: which noises: those that the teacher starts from too, or number 1, 2, ... of the others.

        Returns:
            Clean latents, and predictions of x0 on the way there: sample i's at the contract's level i modulo their
            number, which is what a critic is trained on. Both [n, channels, frames, height, width].
        """
        draws, levels = _draws(self.work, self.total, draw), contract.sigmas
        noises = [draws.normal(*self.shape[1:]) for _ in range(1 + len(levels) * contract.stochastic)]
        place_of = torch.arange(self.total)[draws.mine] % len(levels)
        clean, along = [], []
        for part in torch.split(torch.arange(len(draws)), self.at_once):
            given = select(self.given, part.to(self.work.device))
            again = _one_by_one([noise[part] for noise in noises])
            x = self.start(again(noises[0]).to(self.work.device), given)
            seen, walk = torch.zeros_like(x), Walk(contract)
            for place, sigma in enumerate(levels):
                prediction = predict(network, contract, place, x, given, self.negative)
                x0 = contract.process.tweedie(x, prediction, torch.full((len(x),), sigma, device=x.device))
                here = (place_of[part] == place).to(x.device)
                seen = torch.where(expand_to(here, x), x0, seen)
                x = walk(x, prediction, place, again)
                self.work.world.heartbeat()
            clean.append(x)
            along.append(seen)
        return torch.cat(clean), torch.cat(along)


class Samples:
    """A student's samples against those that its teacher made once.

    Args:
        prompts: what both sample.
        program: whose autoencoder decodes the pictures.
        teacher: made to sample when the first figures are asked for; what its samples were like is kept on disk.
        contract: the teacher's.
    """

    def __init__(self, prompts: Prompts, program: Program, teacher: Network, contract: SamplingContract) -> None:
        self._prompts, self._program, self._teacher, self._contract = prompts, program, teacher, contract
        self._work = prompts.work
        self._reference: Moments | None = None
        self._teacher_redraws: list[dict[str, float]] | None = None

    def figures(self, step: int, student: Network, contract: SamplingContract) -> dict[str, float]:
        """Sample the student, draw a few, and compare; all processes together.

        Returns:
            sample_distance, sample_deviation, sample_saturation and, of clips, sample_motion.
        """
        reference = self._reference = self._reference or self._made()
        clean, _ = self._prompts.sampled(student, contract)
        if self._work.world.main:
            draw_strip(self._work, self._program, clean[:SHOWN], strip_of(self._work.directory, step))
            self._work.world.heartbeat()
        return compared(clean, reference, self._work.world)

    def redrawn(self, draw: int, student: Network, contract: SamplingContract) -> dict[str, float]:
        """The figures of the same prompts with other noises; after `figures`, all processes together."""
        assert self._reference is not None
        clean, _ = self._prompts.sampled(student, contract, draw)
        return compared(clean, self._reference, self._work.world)

    def of_teacher(self) -> list[dict[str, float]]:
        """The figures of the teacher's own samples with other noises; after `figures`, all processes together."""
        path, world = self._work.directory / CHECKPOINTS / "teacher-redraws.json", self._work.world
        if self._teacher_redraws is None:
            self._teacher_redraws = world.broadcast(lambda: json.loads(path.read_text()) if path.exists() else [])
        while len(self._teacher_redraws) < TEACHER_REDRAWS:
            draw = 1 + len(self._teacher_redraws)
            self._teacher_redraws.append(self.redrawn(draw, self._teacher, self._contract))
            if world.main:
                write_text(path, json.dumps(self._teacher_redraws) + "\n")
        return self._teacher_redraws

    def _made(self) -> Moments:
        """The teacher's moments: those of an earlier start of this training, else its samples are made now."""
        path, world = self._work.directory / CHECKPOINTS / "teacher.safetensors", self._work.world
        if world.broadcast(path.exists):
            found: Moments = load_file(str(path))
            return found
        clean, _ = self._prompts.sampled(self._teacher, self._contract)
        made = moments(clean, world)
        if world.main:
            draw_strip(self._work, self._program, clean[:SHOWN], reference_strip(self._work.directory))
            world.heartbeat()
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(dict(made), str(temporary))
        return made


def moments(latents: torch.Tensor, world: World) -> Moments:
    """Of all processes' samples [n, channels, frames, height, width]; see `Moments`."""
    sums: dict[str, torch.Tensor] = {}
    for view, parts in _views(latents).items():
        flat = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1)
        count = torch.full((1,), float(flat.shape[1]), dtype=torch.float64)
        sums |= {f"{view}.sum": flat.sum(1), f"{view}.square": flat.square().sum(1), f"{view}.count": count}
    x = latents.double()
    sums["deviation"] = x.flatten(1).std(dim=1).mean().reshape(1)
    if latents.shape[2] > 1:
        sums["motion"] = x.diff(dim=2).abs().mean().reshape(1)
    agreed = _agreed({name: value.cpu() for name, value in sums.items()}, world)
    found = {name: value for name, value in agreed.items() if "." not in name}
    for view in _views(latents):
        mean, square = (agreed[f"{view}.{name}"] / agreed[f"{view}.count"] for name in ("sum", "square"))
        found |= {f"{view}.mean": mean, f"{view}.deviation": (square - mean.square()).clamp(min=0.0).sqrt()}
    return found


def compared(latents: torch.Tensor, reference: Moments, world: World) -> dict[str, float]:
    """The figures of samples against the moments of the teacher's; see docs/health.md."""
    ours = moments(latents, world)
    distances = []
    for view in (name.removesuffix(".mean") for name in reference if name.endswith(".mean")):
        mean, deviation = (ours[f"{view}.{name}"] - reference[f"{view}.{name}"] for name in ("mean", "deviation"))
        distances.append((mean.square() + deviation.square()) / reference[f"{view}.deviation"].square())
    middle, width = (
        reference[f"x.{name}"].to(latents.device).reshape(1, -1, 1, 1, 1) for name in ("mean", "deviation")
    )
    beyond = ((latents.double() - middle).abs() > BEYOND * width).double().mean().reshape(1).cpu()
    figures = {
        "sample_distance": float(torch.cat(distances).mean()),
        "sample_deviation": float(ours["deviation"] / reference["deviation"]),
        "sample_saturation": float(_agreed({"share": beyond}, world)["share"]),
    }
    if "motion" in reference:
        figures["sample_motion"] = float(ours["motion"] / reference["motion"])
    return figures


def _views(latents: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """The values, what changes from frame to frame, and what changes from place to place."""
    x = latents.double()
    views = {"x": [x], "space": [x.diff(dim=3), x.diff(dim=4)]}
    return views | {"time": [x.diff(dim=2)]} if latents.shape[2] > 1 else views


def _agreed(tensors: Mapping[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """The mean of each tensor over the processes."""
    flat = {f"{name} {place}": one for name, value in tensors.items() for place, one in enumerate(value.tolist())}
    mean = world.all_mean(flat)
    return {
        name: torch.tensor([mean[f"{name} {place}"] for place in range(len(value))], dtype=torch.float64)
        for name, value in tensors.items()
    }


def _one_by_one(noises: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    source = iter(noises)
    return lambda like: next(source)


def _draws(work: PassContext, total: int, draw: int = 0) -> Draws:
    parts = (work.seed, "health", "samples", *([draw] if draw else []))
    return Draws(*parts, batch=total, rank=work.world.rank, processes=work.world.size)
