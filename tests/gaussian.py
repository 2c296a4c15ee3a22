"""A world in which the data are Gaussian, so that all that the method computes is a closed formula.

    x0 ~ N(m, S),   x = a x0 + b e   =>   E[x0 | x] = m + a S (a^2 S + b^2)^-1 (x - a m)

Networks that predict exactly that, and students of one affine layer, take transformers' places in the real passes.
Latents are [n, 1, 2, 1, 1], two numbers each: one channel, two frames.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, WanTransformer3DModel
from torch import Tensor, nn

from flcompress.diffusion.contract import SamplingContract, contract_of
from flcompress.draws import Draws
from flcompress.ir.block import Block, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph, Edge
from flcompress.pipeline.health import Health
from flcompress.pipeline.passes import Work
from flcompress.pipeline.program import Program
from flcompress.training.engines.replicated import Local

SIZE = 2
LATENTS = (1, SIZE, 1, 1)
PROMPT = "encoder_hidden_states"
COVARIANCE = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
SHIFTS = [[0.3, -0.2], [0.1, 0.4]]
"""How far each block of an exact network moves the mean."""
KINDS = ("flow", "v_prediction", "epsilon")


@dataclass(frozen=True)
class Normal:
    """A Gaussian: mean [..., d] and covariance [d, d], of which the mean may differ from sample to sample."""

    mean: Tensor
    covariance: Tensor

    def denoised(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """E[x0 | a x0 + b e = x] for x [n, d] and a, b [n]."""
        # The inverse of a 2 x 2 matrix by its formula: a solver would start threads for it.
        first, both, second = self.covariance[0, 0], self.covariance[0, 1], self.covariance[1, 1]
        p, q, r = a**2 * first + b**2, a**2 * both, a**2 * second + b**2
        one, two = (x - a[:, None] * self.mean).unbind(1)
        scaled = torch.stack([r * one - q * two, p * two - q * one], dim=1) / (p * r - q**2)[:, None]
        found: Tensor = self.mean + a[:, None] * scaled @ self.covariance
        return found

    def drawn(self, n: int, seed: int) -> Tensor:
        """Samples [n, d] whose mean and covariance are exactly those of the Gaussian."""
        white = torch.randn(n, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        white = white - white.mean(0)
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(white.T @ white / n), white.T, upper=False).T
        drawn: Tensor = self.mean.double() + white @ torch.linalg.cholesky(self.covariance.double()).T
        return drawn


def moments(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of latents, or of samples [n, d]."""
    flat = samples.detach().double().flatten(1)
    centred = flat - flat.mean(0)
    return flat.mean(0), centred.T @ centred / len(flat)


def latents(samples: Tensor) -> Tensor:
    """[n, d] as latents."""
    return samples.reshape(-1, *LATENTS)


def teacher_contract(kind: str, *, steps: int = 50, guidance: float = 1.0, shift: float = 3.0) -> SamplingContract:
    """A contract of a flow process, or of a discrete one."""
    scheduler = {"shift": shift} if kind == "flow" else {**_DISCRETE, "prediction_type": kind}
    return contract_of(scheduler, num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=1)


_DISCRETE = {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 1.0, "timestep_spacing": "trailing"}


@lru_cache
def _signal() -> Tensor:
    scheduler = CogVideoXDDIMScheduler.from_config(_DISCRETE)
    signal: Tensor = scheduler.alphas_cumprod.double()
    return signal


def coefficients(kind: str, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) [n] at what a network is told: from the stock scheduler's own table where the process is discrete."""
    if kind == "flow":
        s = timestep.double() / 1000.0
        return 1.0 - s, s
    signal = _signal()[timestep.round().long()]
    return signal.sqrt(), (1.0 - signal).sqrt()


def as_predicted(kind: str, x: Tensor, x0: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What a network of this kind predicts where it takes x [n, d] for x0 noised."""
    a, b = a[:, None], b[:, None]
    noise = (x - a * x0) / b
    return {"flow": noise - x0, "v_prediction": a * noise - b * x0, "epsilon": noise}[kind]


class Shift(nn.Module):
    """A block: it moves the mean, the first of two tokens; the second is the noised sample."""

    def __init__(self, by: Sequence[float]) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.stack([hidden_states[:, 0] + self.by, hidden_states[:, 1]], dim=1)


class Exact(WanTransformer3DModel):  # type: ignore[misc]
    """Predicts exactly for N(prompt + shifts of its blocks, F F'); F and the shifts can be trained."""

    def __init__(self, kind: str, covariance: Tensor, shifts: Sequence[Sequence[float]]) -> None:
        nn.Module.__init__(self)
        self.register_to_config(patch_size=(1, 1, 1))
        self.kind = kind
        self.blocks = nn.ModuleList(map(Shift, shifts))
        self.factor = nn.Parameter(torch.linalg.cholesky(covariance.double()).float())

    @property
    def covariance(self) -> Tensor:
        return self.factor @ self.factor.T

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        x = hidden_states.flatten(1)
        tokens = torch.stack([encoder_hidden_states[:, 0], x], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        a, b = (one.to(x.dtype) for one in coefficients(self.kind, timestep))
        x0 = Normal(tokens[:, 0], self.covariance).denoised(x, a, b)
        return (as_predicted(self.kind, x, x0, a, b).reshape(hidden_states.shape),)


class Affine(WanTransformer3DModel):  # type: ignore[misc]
    """A student of one affine layer at each of its levels: x0 = A x + c."""

    def __init__(self, kind: str, contract: SamplingContract, weight: Tensor, bias: Tensor) -> None:
        nn.Module.__init__(self)
        self.register_to_config(patch_size=(1, 1, 1))
        self.kind, self.timesteps = kind, torch.tensor(contract.timesteps)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in contract.timesteps)
        for layer in self.layers:
            layer.weight.data, layer.bias.data = weight.clone().float(), bias.clone().float()

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        (place,) = (self.timesteps - timestep[0]).abs().argmin().reshape(1).tolist()
        assert torch.allclose(timestep, self.timesteps[place].expand(len(timestep))), "not a level of the student's"
        x = hidden_states.flatten(1)
        a, b = (one.to(x.dtype) for one in coefficients(self.kind, timestep))
        return (as_predicted(self.kind, x, self.layers[place](x), a, b).reshape(hidden_states.shape),)


def graph_of(model: Exact) -> BlockGraph:
    """The graph of an `Exact`'s blocks."""
    spec = TensorSpec(shape=(1, 2, SIZE), dtype="float32")
    stream = Stream(input="hidden_states", output=0, spec=spec)
    count = len(model.blocks)
    blocks = [
        Block(
            path=f"blocks.{place}",
            stack="blocks",
            index=place,
            kind="Shift",
            streams=(stream,),
            parameters=SIZE,
            flops=SIZE,
            removable=True,
        )
        for place in range(count)
    ]
    ends = ["input", *(block.path for block in blocks), "output"]
    flows: dict[Edge, list[Flow]] = {}
    for one, other in pairwise(ends):
        source, target = PROMPT if one == "input" else "0", "0" if other == "output" else "hidden_states"
        flows[one, other] = [Flow(source=source, target=target, spec=spec)]
    return BlockGraph(
        model_class="Exact",
        parameters=SIZE * count + SIZE**2,
        flops=SIZE * count + 1,
        blocks=blocks,
        flows=flows,
        config_keys={"blocks": "num_layers"},
    )


@dataclass
class Clips:
    """A dataset of Gaussian clips that all have one prompt, with the interface of `LatentDataset`."""

    normal: Normal
    prompt: Tensor
    count: int = 64
    negative: dict[str, Tensor] = field(default_factory=lambda: {PROMPT: torch.zeros(1, 1, SIZE)})
    prompts_only: bool = False

    @property
    def empty(self) -> dict[str, Tensor]:
        return self.negative

    def __len__(self) -> int:
        return self.count

    def given(self, n: int) -> dict[str, Tensor]:
        return {PROMPT: self.prompt.float().expand(n, 1, SIZE).clone()}

    def batch(self, n: int, generator: torch.Generator, mine: slice = slice(None)) -> tuple[Tensor, dict[str, Tensor]]:
        white = torch.randn(n, SIZE, generator=generator, dtype=torch.float64)[mine]
        x0 = self.normal.mean + white @ torch.linalg.cholesky(self.normal.covariance).T
        return latents(x0).float(), self.given(len(x0))

    def conditions(
        self, n: int, generator: torch.Generator, latents: tuple[int, ...], mine: slice = slice(None)
    ) -> tuple[tuple[int, ...], dict[str, Tensor]]:
        count = len(range(n)[mine])
        return (count, *latents), self.given(count)

    def by_size(self, n: int, generator: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        yield self.batch(n, generator)

    def split(self, heldout: int) -> tuple[Clips, Clips]:
        return self, self


class Stand(Local):
    """The engine for one process, which takes models by the names of folders that do not exist."""

    def __init__(self, work: Work, models: Mapping[str, nn.Module]) -> None:
        super().__init__(work)
        self._models = models
        self.loaded: list[tuple[str, nn.Module]] = []

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, whole: Collection[str] = ()) -> Any:
        model = copy.deepcopy(self._models[folder.name]).requires_grad_(trained)
        self.loaded.append((folder.name, model))
        return model

    def graph(self, folder: Path) -> BlockGraph:
        model = self._models[folder.name]
        assert isinstance(model, Exact)
        return graph_of(model)


def work_in(folder: Path, clips: Clips | None = None, *, seed: int = 0) -> Work:
    """What a pass works with: nothing is looked at."""

    def data(program: Program) -> Any:
        return clips

    health = Health(samples=0, every=10**6, max_drift=None, max_worsening=None, min_normaliser=None)
    return Work(directory=folder, seed=seed, data=data, progress=lambda *_: None, health=health)


def program_of(
    teacher: SamplingContract,
    graph: BlockGraph,
    prune_set: Sequence[str] = (),
    shape: tuple[int, int, int, int] = LATENTS,
) -> Program:
    """A program whose components are the names that a `Stand` knows; latents of any shape of two numbers."""
    names = ("transformer", "elastic", "original")
    return Program(
        graph=graph,
        index={"_class_name": "WanPipeline"},
        latents=shape,
        components={name: Path(name) for name in names},
        contract=teacher,
        teacher_contract=teacher,
        prune_set=tuple(prune_set),
    )


def draws(number: int = 1, batch: int = 64) -> Draws:
    """What a training draws in one step."""
    return Draws(0, "training", number, batch=batch)
