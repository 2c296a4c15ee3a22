"""Train a transformer by flow matching with dropped captions (used for the embedded benchmark's teacher)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field

from flcompress.data.latents import LatentDataset
from flcompress.diffusion.conditioning import dropped
from flcompress.diffusion.contract import SamplingContract
from flcompress.models.network import as_network
from flcompress.pipeline.passes import Cost, Pass, Role, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.training.loop import train
from flcompress.training.objectives import denoising_loss, draw_levels
from flcompress.training.trained import Trained, warmup_cosine

MONITOR_CLIPS = 256


class Pretrain(Pass):
    """Train the transformer from its present weights on the recipe's clips and captions.

    `- pretrain: {steps: 6000, batch: 32}`
    """

    name: ClassVar[str] = "pretrain"
    needs_data: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.TRAINED})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED, Fact.ELASTIC})

    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(32, gt=0, description="clips a step")
    learning_rate: float = Field(1e-3, gt=0, description="peak; rises for 200 steps, then half a cosine")
    shift: float = Field(3.0, gt=0, description="noise levels are drawn evenly, then shifted by this toward noise")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained with the empty prompt")
    compile: bool = Field(False, description="train through torch.compile; needs a C++ compiler")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the moving average that is kept")

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            steps=self.steps,
            forwards=3.0 * self.steps * self.batch,
            batch=self.batch,
            roles=(Role("model", parameters, trained=True, averaged=True),),
        )

    def apply(self, program: Program, work: Work) -> Program:
        model = work.trained(program.components["transformer"])
        data = work.data(program)
        trained = self.fit(model, program.contract, data, work)
        model.load_state_dict(trained)
        target = work.directory / "transformer"
        model.save_pretrained(str(target))
        (work.directory / "result.json").write_text(json.dumps({"steps": self.steps}) + "\n", encoding="utf-8")
        return (
            program.with_component("transformer", target)
            .with_component("original", target)
            .with_component("elastic", target)
        )

    def fit(
        self,
        model: Any,
        contract: SamplingContract,
        data: LatentDataset,
        work: Work,
    ) -> dict[str, torch.Tensor]:
        """Train `model` in place and return the state dict of its moving average."""
        role = Trained(
            "pretrain",
            model.train(),
            learning_rate=self.learning_rate,
            ema_decay=self.ema_decay,
            schedule=warmup_cosine(self.steps, min(200, self.steps)),
        )
        network, process = as_network(model, contract.embedded_guidance), contract.process
        compiled: Any = torch.compile(model) if self.compile else model
        trained_network = as_network(compiled, contract.embedded_guidance)
        training, heldout = data.split(min(MONITOR_CLIPS, len(data) // 4))

        def train_step(step: int, draw: torch.Generator) -> Mapping[str, float]:
            x0, given = training.batch(self.batch, draw)
            given = dropped(given, data.negative, torch.rand(self.batch, generator=draw) < self.caption_dropout)
            noise = torch.randn(x0.shape, generator=draw)
            level = draw_levels(self.batch, self.shift, draw)
            return role.update(denoising_loss(trained_network, process, x0, given, level, noise))

        @torch.no_grad()
        def monitor(step: int) -> Mapping[str, float]:
            draw = torch.Generator().manual_seed(0)
            x0, given = heldout.batch(MONITOR_CLIPS, draw)
            noise = torch.randn(x0.shape, generator=draw)
            level = draw_levels(MONITOR_CLIPS, self.shift, draw)
            return {"heldout_loss": float(denoising_loss(network, process, x0, given, level, noise))}

        train(
            train_step,
            [role],
            steps=self.steps,
            seed=(work.seed, self.name),
            directory=work.directory,
            progress=work.progress,
            precision=work.precision,
            monitor=monitor,
            monitor_every=250,
        )
        model.eval()
        return role.averaged_state()
