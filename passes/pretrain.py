"""Train a transformer by flow matching with dropped captions (used for the embedded benchmark's teacher)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from flcompress.data.latents import LatentDataset
from flcompress.diffusion.sampling import as_network
from flcompress.models.loading import load_transformer
from flcompress.pipeline.passes import Cost, Pass, ProgressSink, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.training.loop import train
from flcompress.training.objectives import draw_sigmas, flow_matching_loss
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

    def cost(self, parameters: float, blocks: int) -> Cost:
        return Cost(steps=self.steps, forwards=3.0 * self.steps * self.batch, batch=self.batch, trained=parameters)

    def apply(self, program: Program, work: Work) -> Program:
        model = load_transformer(program.components["transformer"], work.device).requires_grad_(True)
        trained = self.fit(model, work.data(program), work.seed, work.directory, work.progress)
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
        self, model: Any, data: LatentDataset, seed: int, directory: Path, progress: ProgressSink
    ) -> dict[str, torch.Tensor]:
        """Train `model` in place and return the state dict of its moving average."""
        role = Trained(
            "pretrain",
            model.train(),
            learning_rate=self.learning_rate,
            ema_decay=self.ema_decay,
            schedule=warmup_cosine(self.steps, min(200, self.steps)),
        )
        network = as_network(model)
        compiled: Any = torch.compile(model) if self.compile else model
        trained_network = as_network(compiled)
        training, heldout = data.split(min(MONITOR_CLIPS, len(data) // 4))

        def train_step(step: int, draw: torch.Generator) -> Mapping[str, float]:
            x0, embeds = training.batch(self.batch, draw)
            dropped = torch.rand(self.batch, generator=draw) < self.caption_dropout
            embeds = torch.where(dropped[:, None, None], data.negative_embeds, embeds)
            noise = torch.randn(x0.shape, generator=draw)
            sigma = draw_sigmas(self.batch, self.shift, draw)
            return role.update(flow_matching_loss(trained_network, x0, embeds, sigma, noise))

        @torch.no_grad()
        def monitor(step: int) -> Mapping[str, float]:
            draw = torch.Generator().manual_seed(0)
            x0, embeds = heldout.batch(MONITOR_CLIPS, draw)
            noise = torch.randn(x0.shape, generator=draw)
            sigma = draw_sigmas(MONITOR_CLIPS, self.shift, draw)
            return {"heldout_loss": float(flow_matching_loss(network, x0, embeds, sigma, noise))}

        train(
            train_step,
            [role],
            steps=self.steps,
            seed=(seed, self.name),
            directory=directory,
            progress=progress,
            monitor=monitor,
            monitor_every=250,
        )
        model.eval()
        return role.averaged_state()
