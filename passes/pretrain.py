"""Train a transformer by flow matching with dropped captions (used for the embedded benchmark's teacher)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field

from flcompress.core.program import Fact, Program
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.diffusion.conditioning import dropped, on
from flcompress.draws import Draws
from flcompress.models.loading import save_transformer
from flcompress.models.network import as_network
from flcompress.training.engines import Engine, Hyper, engine_of
from flcompress.training.loop import train
from flcompress.training.objectives import denoising_loss, draw_levels, level_range
from flcompress.training.role import Trained, warmup_cosine
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutHealth
from flcompress.training.watching.monitor import Watch

MONITOR_CLIPS = 256


class Pretrain(Pass):
    """Train the transformer from its present weights on the recipe's clips and captions.

    `- pretrain: {steps: 6000, batch: 32}`
    """

    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 2
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.TRAINED})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED, Fact.ELASTIC})

    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(32, gt=0, description="clips a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak; rises for 200 steps, then half a cosine")
    shift: float = Field(3.0, gt=0, description="noise levels are drawn evenly, then shifted by this toward noise")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained with the empty prompt")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the moving average that is kept")

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            steps=self.steps,
            forwards=3.0 * self.steps * self.batch,
            again=self.steps * self.batch,
            batch=self.batch,
            roles=(Role("model", parameters, trained=True, averaged=True),),
        )

    def apply(self, program: Program, work: PassContext) -> Program:
        weights = self._trained(engine_of(work), program)
        target = work.directory / "transformer"
        if work.world.main:
            work.world.main_only(f"saving what {self.name} trained")
            save_transformer(program.components["transformer"], weights, target)
            (work.directory / "result.json").write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")
        return (
            program.with_component("transformer", target)
            .with_component("original", target)
            .with_component("elastic", target)
        )

    def _trained(self, engine: Engine, program: Program) -> dict[str, torch.Tensor]:
        """The moving average of the trained weights, in the main process."""
        work, contract = engine.work, program.contract
        role = Trained(
            engine,
            "pretrain",
            engine.load_trained(program.components["transformer"]).train(),
            batch=self.batch,
            hyper=Hyper(learning_rate=self.learning_rate),
            ema_decay=self.ema_decay,
            schedule=warmup_cosine(self.steps, min(200, self.steps)),
        )
        process, guidance = contract.process, contract.embedded_guidance
        network = as_network(role.module, guidance)
        data = work.data(program)
        training, heldout = data.split(min(MONITOR_CLIPS, len(data) // 4))

        low, high = level_range(contract, self.shift, key=self.name)

        def train_step(step: int, draws: Draws) -> Mapping[str, float]:
            for part in role.micro_batches(draws):
                x0, given = training.batch(part.batch, part.shared, part.mine)
                given = dropped(given, data.empty, part.uniform() < self.caption_dropout)
                noise, level = part.normal(*x0.shape[1:]), draw_levels(part, self.shift, low=low, high=high)
                x0, noise, level = (t.to(work.device) for t in (x0, noise, level))
                loss = denoising_loss(network, process, x0, on(given, work.device), level, noise)
                role.backward(loss, part)
            return role.step()

        at_once = work.at_once(self.batch)
        elbo = HeldOutELBO(heldout, contract, len(heldout), work.seed, work.device, at_once, work.world)
        health = HeldOutHealth(elbo, {"elbo": network})
        watch = Watch(work, name=self.name, look=health.look, again=health.again, held_out="elbo")
        train(train_step, [role], engine=engine, name=self.name, steps=self.steps, batch=self.batch, watch=watch)
        return role.averaged_state()
