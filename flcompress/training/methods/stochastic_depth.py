"""Train a transformer to work with and without the blocks of its prune set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from flcompress.core.program import Program
from flcompress.diffusion.conditioning import Conditioning, dropped, on
from flcompress.draws import Draws
from flcompress.models.network import as_network
from flcompress.tracing.prefix import remember
from flcompress.tracing.skip import skipping
from flcompress.training.engines import Engine, Hyper
from flcompress.training.loop import train
from flcompress.training.objectives import draw_levels, level_range
from flcompress.training.role import Trained, warmup_cosine
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutHealth
from flcompress.training.watching.monitor import Limit, Watch

HELD_OUT_CLIPS = 128
TARGET_EMA_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class StochasticDepthTraining:
    """The training of the `stochastic-depth` pass; the attributes are the pass's arguments."""

    name: str
    skip_probability: float
    alpha: float
    target: Literal["frozen", "ema", "self"]
    steps: int
    batch: int
    learning_rate: float
    caption_dropout: float

    def weights(self, engine: Engine, program: Program) -> dict[str, torch.Tensor]:
        """The trained weights, in the main process."""
        work, contract, graph, paths = engine.work, program.contract, program.graph, program.prune_set
        source, process, guidance = program.components["transformer"], contract.process, contract.embedded_guidance
        data = work.data(program)
        training, heldout = data.split(min(HELD_OUT_CLIPS, max(1, len(data) // 4)))
        role = Trained(
            engine,
            "stochastic_depth",
            engine.load_trained(source),
            batch=self.batch,
            hyper=Hyper(learning_rate=self.learning_rate),
            ema_decay=TARGET_EMA_DECAY if self.target == "ema" else None,
            schedule=warmup_cosine(self.steps, min(20, self.steps)),
        )
        network = as_network(role.module, guidance)
        original = as_network(engine.frozen(engine.load_frozen(source)), guidance)

        def both(
            x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, skipped: list[str]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """(prediction of the pruned path, its target: the full path's, without gradient)."""
            if self.target == "self" and not skipped:
                pruned = network(x, timestep, given)
                return pruned, pruned.detach()
            if self.target == "self" and not engine.splits_weights:
                # Both paths share the weights, so what lies before the first skipped block is computed once.
                with remember(role.model, graph, until=skipped[0]) as memory:
                    with engine.skip(role.model, skipped, graph=graph):
                        pruned = network(x, timestep, given)
                    with torch.no_grad(), memory.recalled():
                        return pruned, network(x, timestep, given)
            with torch.no_grad():
                if self.target == "frozen":
                    full = original(x, timestep, given)
                else:
                    with role.averaged():
                        full = network(x, timestep, given)
            work.world.heartbeat()
            with engine.skip(role.model, skipped, graph=graph):
                return network(x, timestep, given), full

        low, high = level_range(contract, contract.shift, key=self.name)

        def train_step(step: int, draws: Draws) -> Mapping[str, float]:
            for part in role.micro_batches(draws):
                x0, given = training.batch(part.batch, part.shared, part.mine)
                given = dropped(given, training.negative, part.uniform() < self.caption_dropout)
                noise, level = part.normal(*x0.shape[1:]), draw_levels(part, contract.shift, low=low, high=high)
                # One mask for all processes: sharded engines hang, or go wrong, on masks that differ.
                mask = torch.rand(len(paths), generator=part.shared) < self.skip_probability
                skipped = [path for path, gone in zip(paths, mask.tolist(), strict=True) if gone]
                x0, noise, level = (t.to(work.device) for t in (x0, noise, level))
                x = process.add_noise(x0, noise, level)
                pruned, full = both(x, process.timestep(level), on(given, work.device), skipped)
                loss = self.alpha * (pruned - full).square().mean()
                if self.alpha < 1.0:
                    loss = loss + (1.0 - self.alpha) * (pruned - process.target(x0, noise, level)).square().mean()
                # The backward too: under gradient checkpointing it computes blocks again, and must skip the same ones.
                with engine.skip(role.model, skipped, graph=graph):
                    role.backward(loss, part)
            return role.step()

        at_once = work.at_once(self.batch)
        elbo = HeldOutELBO(heldout, contract, len(heldout), work.seed, work.device, at_once, work.world)
        with engine.forward_mode():
            reference = elbo(original)

        def figures(losses: Mapping[str, float]) -> Mapping[str, float]:
            full, pruned, first = (losses[f"elbo_{name}"] for name in ("full", "pruned", "original"))
            return {**losses, "elbo_mean": (full + pruned) / 2.0, "drift": full / first - 1.0}

        pruned_path = skipping(role.module, paths, graph, guidance, engine.skip)
        networks = {"elbo_full": network, "elbo_pruned": pruned_path}
        health = HeldOutHealth(elbo, networks, figures, fixed={"elbo_original": reference})
        mend = "lower learning_rate" if self.target == "frozen" else "lower learning_rate, or set target: frozen"
        drift = Limit(setting="max_drift", high=work.health.max_drift, mend=mend)
        watch = Watch(
            work,
            name=self.name,
            look=health.look,
            again=health.again,
            held_out="elbo_mean",
            limits={"drift": drift},
        )
        train(train_step, [role], engine=engine, name=self.name, steps=self.steps, batch=self.batch, watch=watch)
        return role.gathered()
