"""Train a transformer by flow matching with dropped captions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Program
from flcompress.diffusion.network import Conditioning, drop_captions
from flcompress.draws import Draws
from flcompress.models.network import as_network
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.loop import train
from flcompress.training.objectives import denoising_loss, draw_levels, level_range
from flcompress.training.role import TrainedRole
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutEvaluation
from flcompress.training.watching.monitor import Watch

MONITOR_CLIPS = 256


def held_out_of(clips: int) -> int:
    """Return how many of the last clips of a dataset the training leaves to the held-out error."""
    return min(MONITOR_CLIPS, clips // 4)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The training of the `pretrain` pass; the attributes are the pass's arguments."""

    name: str
    optimisation: Optimisation
    shift: float
    caption_dropout: float

    def weights(self, engine: Engine, program: Program) -> dict[str, torch.Tensor]:
        """Train; return the moving average of the weights in the main process, nothing in the others."""
        context, contract = engine.context, program.contract
        model = engine.load_trained(program.components["transformer"]).train()
        role = TrainedRole.of(engine, "pretrain", model, self.optimisation)
        process, guidance = contract.process, contract.embedded_guidance
        network = as_network(role.module, guidance)
        data = context.data(program)
        training, heldout = data.split(held_out_of(len(data)))

        low, high = level_range(contract, self.shift, key=self.name)

        def read(draws: Draws) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor]:
            x0, conditioning = training.batch(draws.batch, draws.shared, draws.mine)
            conditioning = drop_captions(conditioning, data.empty, draws.uniform() < self.caption_dropout)
            noise, level = draws.normal(*x0.shape[1:]), draw_levels(draws, self.shift, low=low, high=high)
            return x0, conditioning, noise, level

        feed = Feed(context, read)

        def loss(draws: Draws) -> torch.Tensor:
            x0, conditioning, noise, level = feed.take(read, draws)
            return denoising_loss(network, process, x0, conditioning, level, noise)

        at_once = context.at_once(self.optimisation.batch)
        elbo = HeldOutELBO(heldout, contract, len(heldout), context.seed, context.device, at_once, context.world)
        health = HeldOutEvaluation(elbo, {"elbo": network})
        watch = Watch(context, name=self.name, evaluate=health.evaluate, redraw=health.redraw, held_out="elbo")
        train(
            lambda step, draws: role.update(draws, loss),
            [role],
            engine=engine,
            name=self.name,
            steps=self.optimisation.steps,
            batch=self.optimisation.batch,
            watch=watch,
            feed=feed,
        )
        return role.averaged_state()
