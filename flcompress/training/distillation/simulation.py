"""Backward simulation: a few-step generator's own samples, made the way it will be used (Yin et al. 2024, DMD2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flcompress.core.program import Program
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, to_device
from flcompress.diffusion.sampling import advance, predict
from flcompress.draws import Draws


@dataclass(frozen=True)
class Simulation:
    """What a student's samples are made from.

    Attributes:
        program: whose latents and start of sampling they have.
        contract: the student's levels.
        data: gives sizes and conditioning.
        negative: conditioning of the negative prompt, [1, ...].
        device: the training's.
        partner: of two experts the other one, where it makes steps before the student's; it is not trained.
        heartbeat: called after every network call.
    """

    program: Program
    contract: SamplingContract
    data: LatentDataset
    negative: Conditioning
    device: str
    partner: Network | None = None
    heartbeat: Callable[[], None] = lambda: None

    def sampled(self, generator: Network, draws: Draws, *, grad: bool) -> tuple[torch.Tensor, Conditioning]:
        """Reach a random one of the student's levels by its own steps, then predict x0 there.

        Only the last prediction carries gradient, and only with `grad`. Of two experts, the levels are those of the one
        that is compressed; its partner makes the steps before.

        Returns:
            x0 [n, channels, frames, height, width] and its conditioning.
        """
        contract, places = self.contract, self.contract.own_steps
        shape, given = self.data.conditions(draws.batch, draws.shared, self.program.latents, draws.mine)
        given = to_device(given, self.device)
        # The same level for all processes: else they would wait for the one with most steps, or hang where weights
        # are split.
        last = places[int(torch.randint(len(places), (), generator=draws.shared))]
        x = self.program.family.start(draws.normal(*shape[1:]).to(self.device), given)

        def again(x: torch.Tensor) -> torch.Tensor:
            return draws.normal(*x.shape[1:])

        for place in range(last + 1):
            with torch.set_grad_enabled(grad and place == last):
                if self.partner is None or place in places:
                    timestep = torch.full((len(x),), contract.timesteps[place], device=self.device)
                    prediction = generator(x, timestep, given)
                else:
                    prediction = predict(self.partner, contract, place, x, given, self.negative)
            self.heartbeat()
            if place < last:
                x = advance(contract, x, prediction, place, again)
        level = torch.full((len(x),), contract.sigmas[last], device=self.device)
        return contract.process.tweedie(x, prediction, level), given
