"""Train a transformer to work with and without the blocks of its prune set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.core.program import Program
from flcompress.diffusion.network import Conditioning, drop_captions
from flcompress.draws import Draws
from flcompress.models.network import as_network
from flcompress.tracing.prefix import remember
from flcompress.tracing.skip import skipping_network
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.loop import train
from flcompress.training.objectives import draw_levels, level_range
from flcompress.training.role import Loss, TrainedRole
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutEvaluation
from flcompress.training.watching.monitor import Limit, Watch

HELD_OUT_CLIPS = 128
"""Most clips that the held-out losses are measured on."""
TARGET_EMA_DECAY = 0.99


def held_out_of(clips: int) -> int:
    """Return how many of the last clips of a dataset the training leaves to the held-out losses."""
    return min(HELD_OUT_CLIPS, max(1, clips // 4))


@dataclass(frozen=True, kw_only=True)
class StochasticDepthTraining:
    """The training of the `stochastic-depth` pass; the attributes are the pass's arguments."""

    name: str
    optimisation: Optimisation
    skip_probability: float
    alpha: float
    target: Literal["frozen", "ema", "self"]
    caption_dropout: float

    def weights(self, engine: Engine, program: Program) -> dict[str, torch.Tensor]:
        """Train; return the trained weights in the main process, nothing in the others."""
        roles = DepthRoles(self, program, engine)
        train(
            roles.step,
            [roles.role],
            engine=engine,
            name=self.name,
            steps=self.optimisation.steps,
            batch=self.optimisation.batch,
            watch=roles.watch(),
            feed=roles.feed,
        )
        return roles.role.averaged_state() if self.optimisation.averages else roles.role.full_state()


class DepthRoles:
    """The transformer that learns both depths, and the original that it is compared with.

    Attributes:
        role: the trained transformer.
        feed: the inputs of its updates.
    """

    def __init__(self, settings: StochasticDepthTraining, program: Program, engine: Engine) -> None:
        context, contract = engine.context, program.contract
        self._settings, self._engine, self._context = settings, engine, context
        self._graph, self._prune_set = program.graph, program.prune_set
        self._contract, self._process = contract, contract.process
        source, guidance = program.components["transformer"], contract.embedded_guidance
        data = context.data(program)
        self._training, self._held_out = data.split(held_out_of(len(data)))
        self.role = TrainedRole.of(
            engine,
            "stochastic_depth",
            engine.load_trained(source),
            settings.optimisation,
            ema_decay=settings.optimisation.ema_decay or (TARGET_EMA_DECAY if settings.target == "ema" else 0.0),
        )
        self._network = as_network(self.role.module, guidance)
        self._original = as_network(engine.wrap_frozen(engine.load_frozen(source)), guidance)
        self._low, self._high = level_range(contract, contract.shift, key=settings.name)
        self.feed = Feed(context, self._read)

    def step(self, step: int, draws: Draws) -> Mapping[str, float]:
        """Take one optimiser step."""
        return self.role.update(draws, self._loss)

    def _read(self, draws: Draws) -> tuple[torch.Tensor, Conditioning, torch.Tensor, torch.Tensor, list[str]]:
        """Return (clips, conditioning, noise, levels [n], paths of the skipped blocks)."""
        x0, conditioning = self._training.batch(draws.batch, draws.shared, draws.mine)
        conditioning = drop_captions(
            conditioning, self._training.negative, draws.uniform() < self._settings.caption_dropout
        )
        noise = draws.normal(*x0.shape[1:])
        level = draw_levels(draws, self._contract.shift, low=self._low, high=self._high)
        # One mask for all processes: sharded engines hang, or go wrong, on masks that differ.
        mask = torch.rand(len(self._prune_set), generator=draws.shared) < self._settings.skip_probability
        skipped = [path for path, gone in zip(self._prune_set, mask.tolist(), strict=True) if gone]
        return x0, conditioning, noise, level, skipped

    def _loss(self, draws: Draws) -> Loss:
        """L_II = alpha |f_pruned - target|^2 + (1 - alpha) |f_pruned - v|^2."""
        settings, process = self._settings, self._process
        x0, conditioning, noise, level, skipped = self.feed.take(self._read, draws)
        x = process.add_noise(x0, noise, level)
        pruned, full = self._both_paths(x, process.timestep(level), conditioning, skipped)
        loss = settings.alpha * (pruned - full).square().mean()
        if settings.alpha < 1.0:
            loss = loss + (1.0 - settings.alpha) * (pruned - process.target(x0, noise, level)).square().mean()
        # Under gradient checkpointing the backward recomputes blocks, and must skip the same ones.
        return Loss(value=loss, backward_context=self._engine.skip(self.role.model, skipped, graph=self._graph))

    def _both_paths(
        self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, skipped: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (prediction of the pruned path, its target: the full path's, without gradient)."""
        engine, role, graph, network = self._engine, self.role, self._graph, self._network
        target = self._settings.target
        if target == "self" and not skipped:
            pruned = network(x, timestep, conditioning)
            return pruned, pruned.detach()
        if target == "self" and not engine.splits_weights:
            # Both paths share the weights, so what comes before the first skipped block is computed once.
            with remember(role.model, graph, until=skipped[0]) as memory:
                with engine.skip(role.model, skipped, graph=graph):
                    pruned = network(x, timestep, conditioning)
                with torch.no_grad(), memory.recalling():
                    return pruned, network(x, timestep, conditioning)
        with torch.no_grad():
            if target == "frozen":
                full = self._original(x, timestep, conditioning)
            else:
                with role.with_average():
                    full = network(x, timestep, conditioning)
        self._context.world.heartbeat()
        with engine.skip(role.model, skipped, graph=graph):
            return network(x, timestep, conditioning), full

    def watch(self) -> Watch:
        """Return the watch over the held-out losses of both paths; the original is scored at once."""
        settings, context, engine = self._settings, self._context, self._engine
        at_once = context.at_once(settings.optimisation.batch)
        elbo = HeldOutELBO(
            self._held_out, self._contract, len(self._held_out), context.seed, context.device, at_once, context.world
        )
        with engine.forward_mode():
            reference = elbo(self._original)
        guidance = self._contract.embedded_guidance
        pruned = skipping_network(self.role.module, self._prune_set, self._graph, guidance, engine.skip)
        networks = {"elbo_full": self._network, "elbo_pruned": pruned}
        health = HeldOutEvaluation(elbo, networks, _figures, fixed={"elbo_original": reference})
        fix = "lower learning_rate" if settings.target == "frozen" else "lower learning_rate, or set target: frozen"
        drift = Limit(setting="max_drift", high=context.health.max_drift, fix=fix)
        return Watch(
            context,
            name=settings.name,
            evaluate=health.evaluate,
            redraw=health.redraw,
            held_out="elbo_mean",
            limits={"drift": drift},
        )


def _figures(losses: Mapping[str, float]) -> Mapping[str, float]:
    """Add the mean of both paths' losses, and by what share the full path's exceeds the original's."""
    full, pruned, original = (losses[f"elbo_{name}"] for name in ("full", "pruned", "original"))
    return {**losses, "elbo_mean": (full + pruned) / 2.0, "drift": full / original - 1.0}
