"""Stage I: which blocks matter. Tweedie-ELBO scoring by skipping one block at a time; no training."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from flcompress.core.program import Fact, Program
from flcompress.core.steps import Cost, Pass, PassContext, Role
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.conditioning import Conditioning, on
from flcompress.diffusion.contract import SamplingContract
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.ir.block import Estimate
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import u_index
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, half_precision
from flcompress.progress import ProgressSink
from flcompress.tracing.prefix import remember
from flcompress.training.objectives import level_range


class Importance(Pass):
    """Score every block by the ELBO that is lost when it is skipped.

    I_k = E[ w(s) (|x0 - x0_hat^(-k)|^2 - |x0 - x0_hat|^2) ], the mean taken per latent element; x0_hat by Tweedie. All
    blocks meet the same draws (x0, e, s), so each difference is paired and its standard error small.

    `- importance: {draws: 256, noise_levels: 4, weighting: elbo}`
    """

    name: ClassVar[str] = "importance"
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED})

    draws: int = Field(256, ge=8, description="clips drawn, each with its own noise and noise level")
    noise_levels: int = Field(4, ge=1, description="strata of the noise level; the draws are spread evenly over them")
    weighting: Literal["elbo", "uniform"] = Field(
        "elbo", description="elbo: the continuous-time ELBO weight (1 - s) / s^3; uniform: 1"
    )
    sigma_min: float = Field(0.02, gt=0, lt=1, description="lowest noise level; the ELBO weight diverges at 0")
    sigma_max: float = Field(0.98, gt=0, le=1, description="highest noise level")
    batch: int = Field(32, gt=0, description="draws computed at once, by each process")

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            forwards=self.draws * (blocks + 3) / 2.0,
            batch=self.batch,
            roles=(Role("transformer", parameters),),
            half=True,
            remembers=True,
        )

    def apply(self, program: Program, work: PassContext) -> Program:
        data = work.data(program)
        half = work.precision == "bf16" and work.device == "cuda"  # a CPU's scores are fp32: quick enough, and exact
        model = load_transformer(program.components["transformer"], work.device, torch.bfloat16 if half else None)
        started = time.monotonic()
        with half_precision(work.device, enabled=half):
            estimates = self.score(
                model, program.graph, program.teacher_contract, data, work.seed, work.progress, work.world
            )
        graph = program.graph.with_importance(estimates)
        means = [estimates[block.path].mean for block in graph.blocks]
        result = {
            "weighting": self.weighting,
            "draws": self.draws,
            "levels": [list(level) for level in self._levels(program.teacher_contract)],
            "blocks": [
                {
                    "path": block.path,
                    "mean": estimates[block.path].mean,
                    "standard_error": estimates[block.path].standard_error,
                    "per_level": [list(level) for level in estimates[block.path].per_level],
                }
                for block in graph.blocks
            ],
            "u_index": u_index(means),
            "seconds": work.earlier_seconds + time.monotonic() - started,
            "forwards_equivalent": (len(graph.blocks) + 3) / 2.0,
        }
        if work.world.main:
            (work.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return replace(program, graph=graph)

    def _levels(self, contract: SamplingContract) -> list[tuple[float, float]]:
        low, high = level_range(
            contract, low=self.sigma_min, high=self.sigma_max, key="importance.sigma_min, sigma_max"
        )
        width = (high - low) / self.noise_levels
        return [(low + width * level, low + width * (level + 1)) for level in range(self.noise_levels)]

    def score(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        data: LatentDataset,
        seed: int,
        progress: ProgressSink,
        world: World,
    ) -> dict[str, Estimate]:
        """Importance of every block, by path; the contract names the noising process and the embedded guidance.

        Every process draws everything and computes its share of the batches: the result does not depend on how many
        processes there are.
        """
        paths, batch = [block.path for block in graph.blocks], 0
        losses: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
        per_level = math.ceil(self.draws / self.noise_levels)
        done, total = 0, per_level * self.noise_levels
        levels = self._levels(contract)
        for low, high in levels:
            draw = generator(seed, self.name, low, high)
            mine: dict[str, list[list[float]]] = {}  # number of the batch -> differences, block by block
            for start in range(0, per_level, self.batch):
                n = min(self.batch, per_level - start)
                x0, conditioning = data.batch(n, draw)
                noise = torch.randn(x0.shape, generator=draw)
                sigma = low + (high - low) * torch.rand(n, generator=draw)
                batch += 1
                if batch % world.size == world.rank:
                    world.heartbeat(f"{self.name}: batch {batch}")
                    found = self._differences(model, graph, contract, x0, conditioning, noise, sigma)
                    mine[str(batch)] = [found[path].tolist() for path in paths]
                done += n
                progress(done, total, {})
            level = {int(number): found for one in world.all_gather(mine) for number, found in one.items()}
            for place, path in enumerate(paths):
                values = [value for number in sorted(level) for value in level[number][place]]
                losses[path].append(torch.tensor(values, dtype=torch.float64))
        return {path: self._estimate(levels, strata) for path, strata in losses.items()}

    @torch.no_grad()
    def _differences(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        x0: torch.Tensor,
        conditioning: Conditioning,
        noise: torch.Tensor,
        sigma: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """w(s) (loss without block - loss with all) of each draw: path -> [n], in float64."""
        device = next(model.parameters()).device
        x0, noise, sigma = (tensor.to(device) for tensor in (x0, noise, sigma))
        given, process = on(conditioning, device), contract.process
        weight = process.elbo_weight(sigma) if self.weighting == "elbo" else torch.ones_like(sigma)
        x, network = process.add_noise(x0, noise, sigma), as_network(model, contract.embedded_guidance)

        def loss() -> torch.Tensor:
            error = (x0 - process.tweedie(x, network(x, process.timestep(sigma), given), sigma)).double()
            return (weight * error.square().mean(dim=tuple(range(1, x.ndim)))).cpu()

        with remember(model, graph) as memory:
            full = loss()
            differences = {}
            for block in graph.blocks:
                with memory.skipping(block.path):
                    differences[block.path] = loss() - full
        return differences

    def _estimate(self, levels: list[tuple[float, float]], strata: list[torch.Tensor]) -> Estimate:
        """Stratified mean and standard error: the strata are equally likely and equally large."""
        means = [float(values.mean()) for values in strata]
        errors = [float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan for values in strata]
        return Estimate(
            mean=sum(means) / len(means),
            standard_error=math.sqrt(sum(error**2 for error in errors)) / len(errors),
            per_level=tuple(
                (low, high, mean, error) for (low, high), mean, error in zip(levels, means, errors, strict=True)
            ),
        )
