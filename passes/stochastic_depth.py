"""Stage II: dynamic probabilistic pruning. One set of weights learns to work with and without its prune set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from flcompress.core.program import Fact, Program
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.diffusion.conditioning import Conditioning, dropped, on
from flcompress.draws import Draws
from flcompress.files import lines_of
from flcompress.ir.selection import By, choose
from flcompress.ir.serial import from_json, to_json
from flcompress.models.loading import save_transformer
from flcompress.models.network import as_network
from flcompress.tracing.prefix import remember
from flcompress.tracing.removal.on_disk import choose_removable
from flcompress.tracing.skip import skipping
from flcompress.training.engines import Engine, Hyper, engine_of
from flcompress.training.loop import METRICS_FILE, train
from flcompress.training.objectives import draw_levels, level_range
from flcompress.training.role import Trained, warmup_cosine
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutHealth
from flcompress.training.watching.monitor import Limit, Watch

HELD_OUT_CLIPS = 128
TARGET_EMA_DECAY = 0.99


class StochasticDepth(Pass):
    """Skip each block of the prune set at random and learn to agree with the full depth.

    Every step each block of the prune set is skipped with `skip_probability`, one draw for the whole batch, and

        L_II = alpha |f_pruned - target|^2 + (1 - alpha) |f_pruned - v|^2

    where the target is the full-depth output, without gradient, of the same weights ("self", as in the paper), of their
    moving average ("ema"), or of the original weights ("frozen"). With "self" agreeing on rubbish is an optimum too;
    the held-out ELBO of both paths decides, and `training.health` says what follows where the full path drifts away
    from the original.

    `- stochastic-depth: {remove: 0.3, steps: 400}`
    """

    name: ClassVar[str] = "stochastic-depth"
    version: ClassVar[int] = 3
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    remove: float = Field(gt=0, lt=1, description="share of the parameters that the prune set holds, at least")
    by: By = Field("importance", description="which blocks form it: the least important, random ones, or the middle")
    skip_probability: float = Field(0.5, gt=0, le=1, description="of each block of the prune set, each step")
    alpha: float = Field(1.0, ge=0, le=1, description="weight of self-distillation against the data")
    target: Literal["frozen", "ema", "self"] = Field("frozen", description="whose full-depth output is the target")
    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(16, gt=0, description="clips a step")
    learning_rate: float = Field(5e-4, gt=0, description="peak; rises for 20 steps, then half a cosine")
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="share of clips with the negative prompt (by default empty)"
    )

    @property
    def needs(self) -> frozenset[Fact]:
        return frozenset({Fact.SCORED} if self.by == "importance" else ())

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        roles = [Role("model", parameters, trained=True, averaged=self.target == "ema"), Role("original", parameters)]
        if self.target == "ema":
            roles.append(Role("averaged target", parameters))
        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (1.0 + 3.0 * (1.0 - self.remove * self.skip_probability)),
            again=self.steps * self.batch * (1.0 - self.remove * self.skip_probability),
            batch=self.batch,
            roles=tuple(roles),
        )

    def apply(self, program: Program, work: PassContext) -> Program:
        graph, paths = work.world.broadcast(lambda: self._chosen(program, work))
        program = replace(program, graph=from_json(graph), prune_set=tuple(paths))
        weights = self._trained(engine_of(work), program)
        target = work.directory / "transformer"
        if work.world.main:
            work.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            self._write_result(program, work)
        return program.with_component("transformer", target).with_component("elastic", target)

    def _chosen(self, program: Program, work: PassContext) -> tuple[str, tuple[str, ...]]:
        """(graph, the prune set). A block that cannot be removed must not be trained to be skipped either."""
        graph, paths = choose_removable(
            program.components["transformer"],
            program.graph,
            lambda graph: choose(graph, self.remove, self.by, seed=work.seed),
        )
        return to_json(graph), paths

    def _write_result(self, program: Program, work: PassContext) -> None:
        held = sum(program.graph.block(path).parameters for path in program.prune_set)
        lines = lines_of((work.directory / METRICS_FILE).read_text(encoding="utf-8"))
        result = {
            "prune_set": list(program.prune_set),
            "removed_share": held / program.graph.parameters,
            "by": self.by,
            "target": self.target,
            "monitor": [record for record in map(json.loads, lines) if "elbo_full" in record],
        }
        (work.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def _trained(self, engine: Engine, program: Program) -> dict[str, torch.Tensor]:
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
