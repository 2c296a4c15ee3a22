"""Held-out figures that tell whether a training helps, beside its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.process import Process
from flcompress.distributed.world import World
from flcompress.training.objectives import level_range
from flcompress.training.watching.monitor import Redraws

GROUPS = 8
"""Parts of the held-out draws whose losses are told each by itself; fewer where there are fewer draws."""


@dataclass(frozen=True)
class Scored:
    """The held-out loss of one network.

    Attributes:
        loss: over all draws.
        groups: over each group of them: other clips and noises, levels from the whole range.
    """

    loss: float
    groups: tuple[float, ...]


class HeldOutELBO:
    """The ELBO loss of a network on fixed held-out draws: E[w(s) |x0 - x0_hat|^2], per latent element.

    The same clips, noises and levels at every call, so that two values differ by the networks alone. Of a dataset of
    several sizes each size has its share.

    Args:
        data: held-out clips.
        contract: names the noising process and the levels that the network is responsible for.
        draws: how many are scored.
        seed: of the draws.
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
            whole = process.add_noise(x0, noise, level)
            # Every process must make as many forwards as the others: the last ones repeat a draw, which does not count.
            own = -(-clips // world.size)
            mine = torch.arange(world.rank * own, (world.rank + 1) * own)
            counts = torch.split((mine < clips).double(), at_once)
            for part, count in zip(torch.split(mine.clamp(max=clips - 1), at_once), counts, strict=True):
                self._groups.append(part % GROUPS)
                self._batches.append((x0[part], whole[part], level[part], count, select(conditioning, part)))

    @torch.no_grad()
    def __call__(self, network: Network) -> Scored:
        """Score a network; all processes together."""
        total = draws = 0.0
        sums = torch.zeros(2, GROUPS, dtype=torch.float64)
        for batch, group in zip(self._batches, self._groups, strict=True):
            x0, x, level, count = (tensor.to(self._device) for tensor in batch[:4])
            prediction = network(x, self._process.timestep(level), to_device(batch[4], self._device))
            error = x0 - self._process.tweedie(x, prediction, level)
            per_draw = error.double().square().mean(dim=tuple(range(1, error.ndim)))
            weighted = count * self._process.elbo_weight(level) * per_draw
            total += float(weighted.sum())
            draws += float(count.sum())
            for kind, values in enumerate((weighted, count)):
                sums[kind].index_add_(0, group, values.double().cpu())
            self._world.heartbeat()
        found = {"total": total, "draws": draws}
        found |= {f"{kind} {group}": one for kind, row in enumerate(sums.tolist()) for group, one in enumerate(row)}
        agreed = self._world.all_mean(found)
        groups = [(agreed[f"0 {group}"], agreed[f"1 {group}"]) for group in range(GROUPS)]
        return Scored(agreed["total"] / agreed["draws"], tuple(part / count for part, count in groups if count > 0))


class HeldOutHealth:
    """The looks at a training by held-out losses.

    Args:
        elbo: scores a network.
        networks: name -> one that is trained.
        figures: name -> loss, to the figures; of all held-out draws, and of each group.
        fixed: name -> losses that do not change, for `figures` too.
    """

    def __init__(
        self,
        elbo: HeldOutELBO,
        networks: Mapping[str, Network],
        figures: Callable[[Mapping[str, float]], Mapping[str, float]] = dict,
        fixed: Mapping[str, Scored] | None = None,
    ) -> None:
        self._elbo, self._networks, self._figures = elbo, networks, figures
        self._fixed = dict(fixed or {})
        self._scored: dict[str, Scored] = {}

    def look(self, step: int) -> Mapping[str, float]:
        """The figures of a step."""
        self._scored = {name: self._elbo(network) for name, network in self._networks.items()} | self._fixed
        return self._figures({name: one.loss for name, one in self._scored.items()})

    def again(self, step: int) -> Redraws:
        """The same of each group; after `look`, at no cost."""
        by_group = zip(*(one.groups for one in self._scored.values()), strict=True)
        return Redraws([dict(self._figures(dict(zip(self._scored, losses, strict=True)))) for losses in by_group])


@torch.no_grad()
def critic_lag(
    fake: Network,
    other: Network,
    process: Process,
    x0: torch.Tensor,
    given: Conditioning,
    level: torch.Tensor,
    noise: torch.Tensor,
    *,
    at_once: int,
    world: World,
) -> float:
    """By what share the fake score's denoising loss on fresh samples exceeds the one that it should have.

    A perfect denoiser leaves a residual that no function of its input explains. So its loss should be that of the best
    linear combination of what is at hand, its own prediction F, another network's R, the noised sample and a constant:

        lag = |F - v|^2 / min_w |w1 F + w2 R + w3 x_s + w4 - v|^2 - 1 >= 0

    summed over samples and elements, with v the training target. 0 where nothing at hand improves on F.

    Args:
        fake: the fake score.
        other: a network of the same process that is not trained, such as the real score.
        process: the model's.
        x0: fresh samples of the generator [n, channels, frames, height, width], this process's.
        given: their conditioning.
        level: noise levels [n].
        noise: as x0.
        at_once: samples in one forward.
        world: the processes, each with its share of the samples.
    """
    gram = torch.zeros(5, 5, dtype=torch.float64)
    for part in torch.split(torch.arange(len(x0)), at_once):
        clean, e, s = (tensor[part.to(tensor.device)] for tensor in (x0, noise, level))
        conditioning = select(given, part.to(x0.device))
        x, timestep = process.add_noise(clean, e, s), process.timestep(s)
        columns = [fake(x, timestep, conditioning), other(x, timestep, conditioning), x, torch.ones_like(x)]
        flat = torch.stack([one.double().flatten() for one in (*columns, process.target(clean, e, s))])
        gram += (flat @ flat.T).cpu()
        world.heartbeat()
    mean = world.all_mean({str(place): one for place, one in enumerate(gram.flatten().tolist())})
    gram = torch.tensor(list(mean.values()), dtype=torch.float64).reshape(5, 5)
    inner, onto, square = gram[:4, :4], gram[:4, 4], gram[4, 4]
    # The columns can be alike: the fake score starts as a copy of the other network.
    weights = torch.linalg.pinv(inner, rtol=1e-10, hermitian=True) @ onto
    # Rounding leaves a little where the fit is perfect.
    best = (square - 2.0 * weights @ onto + weights @ inner @ weights).clamp(min=1e-12 * float(square))
    return float((square - 2.0 * onto[0] + inner[0, 0]) / best) - 1.0
