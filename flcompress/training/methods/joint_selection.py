"""Choose the blocks to remove as a set: greedy with re-scoring, then swaps, on the loss that skipping the set adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.distributed.world import World
from flcompress.draws import generator
from flcompress.errors import PreconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.training.methods.skipped_loss import log_levels, skipped_losses
from flcompress.training.objectives import level_range

Paths = tuple[str, ...]
"""Blocks of a set, in execution order."""

Scores = Callable[[Sequence[Paths], int, int], torch.Tensor]
"""(sets, first draw, number of draws) -> the loss that skipping each set adds, [sets, draws], in float64."""

FEWEST_DRAWS = 16
"""Draws on which a race begins; all numbers of draws are multiples of it."""

BEYOND_ERROR = 2.0
"""Paired standard errors by which a set must be behind the leader to be dropped, or ahead to replace it."""

NEIGHBOURS = 6
"""Positions apart, at most, of two blocks that are swapped."""

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A set, the way it was found, and the loss that skipping it adds: mean and standard error over the draws."""

    name: str
    paths: Paths
    mean: float
    standard_error: float


class JointLoss:
    """J(S) = E[ w(s) (|x0 - x0_hat^(-S)|^2 - |x0 - x0_hat|^2) ], per latent element, on draws that all sets share.

    The expectation is Stage I's, s uniform, over levels of `log_levels`. They are an additive golden-ratio sequence,
    which is spread evenly however many of them a race gets to.

    Args:
        model: the transformer.
        graph: its blocks.
        contract: names the noising process, the levels, and the embedded guidance.
        data: clips.
        seed: seeds the draws.
        batch: draws computed at once, by each process; it divides `FEWEST_DRAWS`.
        world: the processes, each of which computes its share of the batches.
    """

    LEVEL_RANGE = (0.02, 0.98)

    def __init__(
        self,
        model: Any,
        graph: BlockGraph,
        contract: SamplingContract,
        data: LatentDataset,
        *,
        seed: int,
        batch: int,
        world: World,
    ) -> None:
        low, high = self.LEVEL_RANGE
        self._low, self._high = level_range(contract, low=low, high=high, key="select")
        self._model, self._graph, self._contract, self._data = model, graph, contract, data
        self._seed, self._batch, self._world = seed, batch, world

    def __call__(self, sets: Sequence[Paths], first: int, count: int) -> torch.Tensor:
        """Score sets on draws `first` to `first + count`, both multiples of the batch; see `Scores`."""
        mine: dict[str, list[list[float]]] = {}
        for number, start in enumerate(range(first, first + count, self._batch)):
            if number % self._world.size == self._world.rank:
                self._world.heartbeat(f"select: draws from {start}")
                mine[str(start)] = self._score(sets, start, self._batch).tolist()
        rows = {int(start): values for own in self._world.all_gather(mine) for start, values in own.items()}
        return torch.cat([torch.tensor(rows[start], dtype=torch.float64) for start in sorted(rows)], dim=1)

    def levels(self, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise levels [count] of draws from `first` on, and what each counts."""
        offset = float(torch.rand((), generator=generator(self._seed, "select", "offset")))
        spread = (offset + _GOLDEN * torch.arange(first, first + count, dtype=torch.float64)) % 1.0
        level, ratio = log_levels(spread, self._low, self._high)
        return level.float(), ratio

    def _score(self, sets: Sequence[Paths], start: int, count: int) -> torch.Tensor:
        draw = generator(self._seed, "select", start)
        x0, conditioning = self._data.batch(count, draw)
        noise, (level, ratio) = torch.randn(x0.shape, generator=draw), self.levels(start, count)
        arguments = (self._model, self._graph, self._contract, sets, x0, conditioning, noise, level)
        return ratio * skipped_losses(*arguments)


@dataclass(frozen=True, kw_only=True)
class Search:
    """The search for a set that holds a share of the parameters and whose removal costs least.

    Attributes:
        scores: what a set costs.
        graph: the blocks; those that are known not to be removable are left out.
        share: share of the model's parameters that the set must hold, at least.
        draws: draws of the final comparison; races begin on fewer.
        progress: called with the number of sets that were scored.
    """

    scores: Scores
    graph: BlockGraph
    share: float
    draws: int
    progress: Callable[[int], None] = lambda sets: None

    def candidates(self, rivals: Mapping[str, Paths]) -> list[Candidate]:
        """Return sets found by the search and others, without repetitions, the least costly first.

        Args:
            rivals: other ways of choosing -> their sets.
        """
        greedy = self.greedy()
        named = {"greedy": greedy, "swapped": self.swap(greedy), "contiguous": self.contiguous(), **rivals}
        distinct: dict[Paths, str] = {}
        for name, paths in named.items():
            if paths:
                distinct.setdefault(paths, name)
        values = self.scores(list(distinct), 0, self.draws)
        measured = [
            Candidate(name=name, paths=paths, mean=float(row.mean()), standard_error=_error(row))
            for (paths, name), row in zip(distinct.items(), values, strict=True)
        ]
        return sorted(measured, key=lambda candidate: candidate.mean)

    def greedy(self) -> Paths:
        """Add the block that costs least per parameter, given those already in the set, until the share is held."""
        chosen: Paths = ()
        while not self._enough(chosen):
            sets = [self._ordered((*chosen, path)) for path in self._removable() if path not in chosen]
            if not sets or len(chosen) + 1 == len(self.graph.blocks):
                held = self._parameters(self._removable()) / self.graph.parameters
                raise PreconditionError(
                    f"remove: {self.share:g} of the parameters asked for; the blocks that may go hold {held:.3f} and "
                    "one must stay; ask for less"
                )
            sizes = torch.tensor([float(self._parameters(paths) - self._parameters(chosen)) for paths in sets])
            chosen = sets[self._race(sets, sizes.double(), base=chosen)]
        return chosen

    def swap(self, chosen: Paths) -> Paths:
        """Replace single blocks of a set by near ones as long as that surely costs less."""
        order = [block.path for block in self.graph.blocks]
        for _ in chosen:
            swaps = [
                self._ordered((*(path for path in chosen if path != out), into))
                for out in chosen
                for into in self._removable()
                if into not in chosen and abs(order.index(out) - order.index(into)) <= NEIGHBOURS
            ]
            sets = [paths for paths in dict.fromkeys(swaps) if self._enough(paths)]
            if not sets:
                break
            best = sets[self._race(sets, torch.ones(len(sets), dtype=torch.float64))]
            gain = torch.sub(*self.scores([chosen, best], 0, self.draws))
            if float(gain.mean()) <= BEYOND_ERROR * _error(gain):
                break
            chosen = best
        return chosen

    def contiguous(self) -> Paths:
        """Return the cheapest run of neighbouring blocks that holds the share; () if there is none."""
        removable, windows = self._removable(), []
        for start in range(len(removable)):
            ends = range(start + 1, len(removable) + 1)
            end = next((end for end in ends if self._enough(removable[start:end])), None)
            if end is not None and end - start < len(self.graph.blocks):
                windows.append(tuple(removable[start:end]))
        return windows[self._race(windows, torch.ones(len(windows), dtype=torch.float64))] if windows else ()

    def _race(self, sets: Sequence[Paths], sizes: torch.Tensor, base: Paths = ()) -> int:
        """Return the index of the set of least cost over size, by successive halving on shared draws.

        The draws are doubled until all are used; a set that is behind the leader by more than its paired error is out.

        Args:
            sets: the sets.
            sizes: what the cost of each is divided by, [sets].
            base: a set whose cost is taken off.
        """
        alive, done, values = list(range(len(sets))), 0, torch.zeros(len(sets), 0, dtype=torch.float64)
        while True:
            upto = min(self.draws, max(FEWEST_DRAWS, 2 * done))
            scored = [base, *(sets[index] for index in alive)] if base else [sets[index] for index in alive]
            fresh = self.scores(scored, done, upto - done)
            self.progress(len(scored))
            fresh = fresh[1:] - fresh[:1] if base else fresh
            values = torch.cat([values, fresh / sizes[alive, None]], dim=1)
            done = upto
            leader = int(values.mean(dim=1).argmin())
            if done == self.draws or len(alive) == 1:
                return alive[leader]
            behind = values - values[leader]
            kept = [row for row in range(len(alive)) if float(behind[row].mean()) <= BEYOND_ERROR * _error(behind[row])]
            alive, values = [alive[row] for row in kept], values[kept]

    def _removable(self) -> list[str]:
        return [block.path for block in self.graph.blocks if block.removable is not False]

    def _parameters(self, paths: Iterable[str]) -> int:
        return sum(self.graph.block(path).parameters for path in paths)

    def _enough(self, paths: Iterable[str]) -> bool:
        return self._parameters(paths) >= self.share * self.graph.parameters

    def _ordered(self, paths: Iterable[str]) -> Paths:
        order = [block.path for block in self.graph.blocks]
        return tuple(sorted(paths, key=order.index))


def _error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of [draws]; of levels that are spread evenly it is an upper bound."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def rank_correlation(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; None of fewer than three values, or where one side is constant."""
    if len(before) < 3 or len(set(before)) == 1 or len(set(after)) == 1:
        return None
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    return float(spearmanr(before, after).statistic)
