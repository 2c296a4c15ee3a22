"""Held-out losses that show whether a training helps, in addition to its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.distributed.world import World
from flcompress.training.objectives import level_range
from flcompress.training.watching.monitor import Redraws

GROUPS = 8
"""Parts of the held-out draws whose losses are reported separately; fewer if there are fewer draws."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The held-out loss of one network.

    Attributes:
        loss: mean over all draws.
        groups: mean over each group of them: other clips and noises, levels from the whole range.
    """

    loss: float
    groups: tuple[float, ...]


class HeldOutELBO:
    """The ELBO loss of a network on fixed held-out draws: E[w(s) |x0 - x0_hat|^2], per latent element.

    Clips, noises and levels are the same at every call, so that two values differ by the networks alone. In a dataset
    of several sizes each size has its share.

    Args:
        data: held-out clips.
        contract: names the noising process and the levels that the network is responsible for.
        draws: number of draws that are scored.
        seed: seeds the draws.
        device: the networks' device.
        at_once: draws in one forward of one process.
        world: the processes, each of which scores its share.
    """

    LEVEL_RANGE = (0.02, 0.98)

    def __init__(
        self,
        data: LatentDataset,
        contract: SamplingContract,
        draws: int,
        seed: int,
        device: str,
        at_once: int,
        world: World,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        process, (low, high) = contract.process, self.LEVEL_RANGE
        low, high = level_range(contract, low=low, high=high, key="held-out ELBO")
        self._process, self._device, self._world = process, device, world
        self._batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Conditioning]] = []
        self._groups: list[torch.Tensor] = []
        # Clips of one size come together, and each size gets levels from the whole range.
        for x0, conditioning in data.by_size(draws, draw):
            noise, clips = torch.randn(x0.shape, generator=draw), len(x0)
            level = low + (high - low) * (torch.arange(clips) + 0.5) / clips
            noisy = process.add_noise(x0, noise, level)
            # Every process must make the same number of forwards: the last ones repeat a draw, which does not count.
            own = -(-clips // world.data_size)
            mine = torch.arange(world.data_rank * own, (world.data_rank + 1) * own)
            counts = torch.split((mine < clips).double(), at_once)
            for part, count in zip(torch.split(mine.clamp(max=clips - 1), at_once), counts, strict=True):
                self._groups.append(part % GROUPS)
                self._batches.append((x0[part], noisy[part], level[part], count, select(conditioning, part)))

    @torch.no_grad()
    def __call__(self, network: Network) -> HeldOutLoss:
        """Score a network; all processes together."""
        total = draws = 0.0
        sums = torch.zeros(2, GROUPS, dtype=torch.float64)
        for batch, group in zip(self._batches, self._groups, strict=True):
            (x0, x, level), count = (tensor.to(self._device) for tensor in batch[:3]), batch[3]
            prediction = network(x, self._process.timestep(level), to_device(batch[4], self._device))
            error = x0 - self._process.tweedie(x, prediction, level)
            per_draw = error.double().square().mean(dim=tuple(range(1, error.ndim)))
            weighted = count * (self._process.elbo_weight(level) * per_draw).cpu()
            total += float(weighted.sum())
            draws += float(count.sum())
            for kind, values in enumerate((weighted, count)):
                sums[kind].index_add_(0, group, values.double())
            self._world.heartbeat()
        own = {"total": total, "draws": draws}
        own |= {f"{kind} {group}": value for kind, row in enumerate(sums.tolist()) for group, value in enumerate(row)}
        agreed = self._world.all_mean(own)
        groups = [(agreed[f"0 {group}"], agreed[f"1 {group}"]) for group in range(GROUPS)]
        return HeldOutLoss(
            agreed["total"] / agreed["draws"], tuple(part / count for part, count in groups if count > 0)
        )


class HeldOutEvaluation:
    """The held-out evaluations of a training by losses.

    Args:
        elbo: scores a network.
        networks: name -> network in training.
        figures: turns losses by name into the figures to log; called for all held-out draws, and for each group.
        fixed: name -> loss of a network that is not trained, also passed to `figures`.
    """

    def __init__(
        self,
        elbo: HeldOutELBO,
        networks: Mapping[str, Network],
        figures: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
        fixed: Mapping[str, HeldOutLoss] | None = None,
    ) -> None:
        self._elbo, self._networks, self._figures = elbo, networks, figures
        self._fixed = dict(fixed or {})
        self._losses: dict[str, HeldOutLoss] = {}

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Score the networks; return the figures of a step."""
        self._losses = {name: self._elbo(network) for name, network in self._networks.items()} | self._fixed
        return self._figures({name: loss.loss for name, loss in self._losses.items()})

    def redraw(self, step: int) -> Redraws:
        """Return the figures of each group of draws; call after `evaluate`, whose forwards it uses."""
        by_group = zip(*(loss.groups for loss in self._losses.values()), strict=True)
        return Redraws([dict(self._figures(dict(zip(self._losses, losses, strict=True)))) for losses in by_group])
