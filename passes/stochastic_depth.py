"""Stage II: dynamic probabilistic pruning. One set of weights learns to work with and without its prune set."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from flcompress.diffusion.conditioning import Conditioning, dropped, on
from flcompress.errors import TrainingError
from flcompress.ir.selection import By, choose
from flcompress.models.loading import frozen
from flcompress.models.network import as_network
from flcompress.models.precision import half_precision
from flcompress.pipeline.passes import Cost, Pass, Role, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.trace.network import skipping
from flcompress.trace.on_disk import choose_removable
from flcompress.trace.prefix import remember
from flcompress.trace.skip import skip
from flcompress.training.loop import train
from flcompress.training.monitors import HeldOutELBO
from flcompress.training.objectives import draw_levels
from flcompress.training.trained import Trained, warmup_cosine

HELD_OUT_CLIPS = 128
TARGET_EMA_DECAY = 0.99


class StochasticDepth(Pass):
    """Skip each block of the prune set at random and learn to agree with the full depth.

    Every step each block of the prune set is skipped with `skip_probability`, one draw for the whole batch, and

        L_II = alpha |f_pruned - target|^2 + (1 - alpha) |f_pruned - v|^2

    where the target is the full-depth output, without gradient, of the same weights ("self", as in the paper), of their
    moving average ("ema"), or of the original weights ("frozen"). With "self" agreeing on rubbish is an optimum too;
    the held-out ELBO of both paths decides, and the pass stops where the full path leaves the original.

    `- stochastic-depth: {remove: 0.3, steps: 400}`
    """

    name: ClassVar[str] = "stochastic-depth"
    needs_data: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    remove: float = Field(gt=0, lt=1, description="share of the parameters that the prune set holds, at least")
    by: By = Field("importance", description="which blocks form it: the least important, random ones, or the middle")
    skip_probability: float = Field(0.5, gt=0, le=1, description="of each block of the prune set, each step")
    alpha: float = Field(1.0, ge=0, le=1, description="weight of self-distillation against the data")
    target: Literal["frozen", "ema", "self"] = Field("frozen", description="whose full-depth output is the target")
    steps: int = Field(gt=0, description="optimiser steps")
    batch: int = Field(16, gt=0, description="clips a step")
    learning_rate: float = Field(5e-4, gt=0, description="peak; rises for 20 steps, then half a cosine")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips with the empty prompt")
    max_drift: float = Field(
        1.0, gt=0, description="stop when the full path's held-out ELBO is worse than the original's by this share"
    )
    monitor_every: int = Field(50, gt=0, description="steps between two looks at the held-out ELBO")

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
            batch=self.batch,
            roles=tuple(roles),
        )

    def apply(self, program: Program, work: Work) -> Program:
        source = program.components["transformer"]
        # A block that cannot be removed must not be trained to be skipped either.
        graph, paths = choose_removable(
            source, program.graph, lambda graph: choose(graph, self.remove, self.by, seed=work.seed), work.device
        )
        program = replace(program, graph=graph)
        model, original = work.trained(source), work.frozen(source)
        self._train(model, original, paths, program, work)
        target = work.directory / "transformer"
        model.save_pretrained(str(target))
        held = sum(program.graph.block(path).parameters for path in paths)
        monitor = [record for record in _log(work) if "elbo_full" in record]
        result = {
            "prune_set": list(paths),
            "removed_share": held / program.graph.parameters,
            "by": self.by,
            "target": self.target,
            "monitor": monitor,
        }
        (work.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        program = program.with_component("transformer", target).with_component("elastic", target)
        return replace(program, prune_set=paths)

    def _train(self, model: Any, original: Any, paths: tuple[str, ...], program: Program, work: Work) -> None:
        data = work.data(program)
        training, heldout = data.split(min(HELD_OUT_CLIPS, max(1, len(data) // 4)))
        role = Trained(
            "stochastic_depth",
            model,
            learning_rate=self.learning_rate,
            ema_decay=TARGET_EMA_DECAY if self.target == "ema" else None,
            schedule=warmup_cosine(self.steps, min(20, self.steps)),
        )
        averaged = frozen(copy.deepcopy(model)) if self.target == "ema" else None
        contract, graph = program.contract, program.graph
        process, guidance = contract.process, contract.embedded_guidance
        network = as_network(model, guidance)

        @torch.no_grad()
        def target(x: torch.Tensor, timestep: torch.Tensor, given: Conditioning) -> torch.Tensor:
            if averaged is not None:
                averaged.load_state_dict(role.averaged_state())
            source = original if self.target == "frozen" else averaged if averaged is not None else model
            return as_network(source, guidance)(x, timestep, given)

        def train_step(step: int, draw: torch.Generator) -> Mapping[str, float]:
            x0, given = training.batch(self.batch, draw)
            given = dropped(given, training.negative, torch.rand(self.batch, generator=draw) < self.caption_dropout)
            noise = torch.randn(x0.shape, generator=draw)
            level = draw_levels(self.batch, contract.shift, draw)
            mask = torch.rand(len(paths), generator=draw) < self.skip_probability
            skipped = [path for path, gone in zip(paths, mask.tolist(), strict=True) if gone]
            x0, noise, level = (t.to(work.device) for t in (x0, noise, level))
            x = process.add_noise(x0, noise, level)
            timestep, given = process.timestep(level), on(given, work.device)

            def update(pruned: torch.Tensor, full: torch.Tensor) -> Mapping[str, float]:
                loss = self.alpha * (pruned - full).square().mean()
                if self.alpha < 1.0:
                    loss = loss + (1.0 - self.alpha) * (pruned - process.target(x0, noise, level)).square().mean()
                return role.update(loss)

            if self.target == "self" and skipped and not work.gradient_checkpointing:
                # Both paths share the weights, so what lies before the first skipped block is computed once.
                with remember(model, graph, detach=False) as memory:
                    full = network(x, timestep, given)
                    with memory.skipping(*skipped):
                        return update(network(x, timestep, given), full.detach())
            full = target(x, timestep, given)
            with skip(model, skipped, graph=graph):
                # The backward too: under gradient checkpointing it computes blocks again, and must skip the same ones.
                return update(network(x, timestep, given), full)

        elbo = HeldOutELBO(heldout, process, len(heldout), work.seed, work.device, self.batch)
        with half_precision(work.device, enabled=work.precision == "bf16"):
            reference = elbo(as_network(original, guidance))

        def monitor(step: int) -> Mapping[str, float]:
            full, pruned = elbo(network), elbo(skipping(model, paths, graph, guidance))
            if not full <= reference * (1.0 + self.max_drift):
                raise TrainingError(
                    f"stochastic-depth: stopped by its monitor at step {step}: held-out ELBO loss of the full path "
                    f"{full:.4g}, expected at most {reference * (1.0 + self.max_drift):.4g} "
                    f"(the original's {reference:.4g} and max_drift {self.max_drift:g}); lower learning_rate, "
                    "or set target: frozen"
                )
            return {"elbo_full": full, "elbo_pruned": pruned, "elbo_original": reference}

        train(
            train_step,
            [role],
            steps=self.steps,
            seed=(work.seed, self.name),
            directory=work.directory,
            progress=work.progress,
            precision=work.precision,
            monitor=monitor,
            monitor_every=self.monitor_every,
        )


def _log(work: Work) -> list[dict[str, float]]:
    lines = (work.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
