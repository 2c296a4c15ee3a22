"""Backward simulation: sample a few-step generator the way it will be used (Yin et al. 2024, DMD2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flcompress.core.program import Program
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network
from flcompress.diffusion.sampling import advance, predict
from flcompress.draws import Draws


class Start(NamedTuple):
    """What the samples of a micro batch are drawn from.

    Attributes:
        conditioning: their conditioning, [n, ...] each.
        last: index of the level at which x0 is predicted.
        noise: standard normal noise [n, channels, frames, height, width].
        renoise: more of it, for each of a stochastic contract's steps before the last.
    """

    conditioning: Conditioning
    last: int
    noise: torch.Tensor
    renoise: list[torch.Tensor]


@dataclass(frozen=True)
class Simulation:
    """Samples a student from noise.

    Attributes:
        program: its latents and its start of sampling are the student's.
        contract: the student's, with its levels.
        data: the source of sizes and conditioning.
        negative: conditioning of the negative prompt, [1, ...].
        device: the training's.
        partner: with two experts the other one, if it takes the steps before the student's; it is not trained.
        heartbeat: called after every network call.
    """

    program: Program
    contract: SamplingContract
    data: LatentDataset
    negative: Conditioning
    device: str
    partner: Network | None = None
    heartbeat: Callable[[], None] = lambda: None

    def draw(self, draws: Draws) -> Start:
        """Draw conditioning, one of the student's levels, and noise, in host memory."""
        steps = self.contract.own_steps
        shape, conditioning = self.data.conditions(draws.batch, draws.shared, self.program.latents, draws.mine)
        # The same level in all processes: otherwise they would wait for the one with most steps, or hang if weights are
        # split.
        last = steps[int(torch.randint(len(steps), (), generator=draws.shared))]
        noise = draws.normal(*shape[1:])
        again = last if self.contract.stochastic else 0
        return Start(conditioning, last, noise, [draws.normal(*shape[1:]) for _ in range(again)])

    def sample(self, generator: Network, start: Start, *, grad: bool) -> torch.Tensor:
        """Reach the drawn one of the student's levels by its own steps, then predict x0 there.

        Only the last prediction carries gradient, and only with `grad`. With two experts, the levels are those of the
        one that is compressed; its partner takes the steps before.

        Returns:
            x0 [n, channels, frames, height, width].
        """
        contract, steps = self.contract, self.contract.own_steps
        conditioning, last, noise, renoise = start
        x, fresh = self.program.family.start(noise, conditioning), iter(renoise)
        for step in range(last + 1):
            with torch.set_grad_enabled(grad and step == last):
                if self.partner is None or step in steps:
                    timestep = torch.full((len(x),), contract.timesteps[step], device=self.device)
                    prediction = generator(x, timestep, conditioning)
                else:
                    prediction = predict(self.partner, contract, step, x, conditioning, self.negative)
            self.heartbeat()
            if step < last:
                x = advance(contract, x, prediction, step, lambda x: next(fresh))
        level = torch.full((len(x),), contract.sigmas[last], device=self.device)
        return contract.process.tweedie(x, prediction, level)
