"""Whole trainings, and how far apart two of them are: in what they logged and in the weights that they reached.

They train with a smooth optimiser. AdamW's step with its stock eps of 1e-8 is nearly lr * sign(g): a gradient that is
zero but for rounding (the bias of a key, which softmax cancels) moves its weight by the whole learning rate, in a
direction that the processor decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from flcompress.draws import Draws
from flcompress.driver.rundir import RunDirectory
from flcompress.training.engines import Hyper
from flcompress.training.engines.optimiser import optimiser
from flcompress.training.role import TrainedRole
from tests.fixtures.rounding import rounding
from tests.training.home import Home
from tests.training.processes import Hook, run

SMOOTH = 0.1
"""AdamW's eps here: far above most gradients of a norm clipped to 1, so a step is nearly linear in the gradient."""

FORWARD = 4 * (8 * 32 + 2 * 64 + 2 * (48 + 16)) + 2 * 64 + 256
"""Operations in a chain through the tiny model: in each of 4 blocks, sums over the 32 channels of eight products and
norms and the 64 of two, scores and softmax over 48 tokens and 16 of text; patches and levels."""
STEP = 2 * 3 * FORWARD + 4 * 48
"""Of an update: forward and twice as much backward, through a model and the one that it is compared with; then sums
over the tokens of 4 samples."""


def smooth(parameters: Sequence[torch.Tensor], hyper: Hyper) -> torch.optim.Optimizer:
    """What engines make, but for its eps."""
    made = optimiser(parameters, hyper)
    for group in made.param_groups:
        group["eps"] = SMOOTH
    return made


class Smooth:
    """The engines of this process make smooth optimisers."""

    def __call__(self) -> None:
        from flcompress.training.engines import replicated, zero

        for module in (replicated, zero):
            vars(module)["optimiser"] = smooth


class ShareForgotten:
    """A fault: every micro batch counts as much as the others, whatever its size."""

    def __call__(self) -> None:
        def backward(self: TrainedRole, loss: torch.Tensor, part: Draws) -> None:
            self._loss = self._loss + part.share * loss.detach()
            self._wrapped.backward(loss)

        TrainedRole._backward = backward  # type: ignore[method-assign]


class LastDropped:
    """A fault: the gradient of a batch's last micro batch is lost."""

    def __call__(self) -> None:
        def backward(self: TrainedRole, loss: torch.Tensor, part: Draws) -> None:
            self._loss = self._loss + part.share * loss.detach()
            last = part.mine.stop == part.batch and part.share < 1.0
            self._wrapped.backward(part.share * loss * (0.0 if last else 1.0))

        TrainedRole._backward = backward  # type: ignore[method-assign]


@dataclass(frozen=True)
class Hooks:
    """Several, one after the other."""

    each: tuple[Hook, ...]

    def __call__(self) -> None:
        for one in self.each:
            one()


@dataclass(frozen=True)
class Difference:
    """How far two trainings are apart at most.

    Attributes:
        logged: of any figure in their logs, relative to the largest value that it has in its log.
        weights: root mean square over a tensor, relative to the way that all weights have gone since the start, pass
            by pass: later passes start from what earlier ones rounded.
    """

    logged: float
    weights: float

    def require(self, updates: int, dtype: torch.dtype = torch.float32, *, operations: int = STEP) -> None:
        """AssertionError where rounding alone cannot have made it in so many updates, one after the other."""
        bound = rounding(updates * operations, dtype)
        assert self.logged < bound, f"logged {self.logged:.1e}, expected below {bound:.1e}"
        assert self.weights < bound, f"weights {self.weights:.1e}, expected below {bound:.1e}"


def applied(
    home: Home,
    name: str,
    passes: Sequence[str],
    engine: str,
    processes: int,
    *options: str,
    fault: Hook | None = None,
) -> Path:
    """A recipe of these passes, applied by an engine to the tiny model; the run directory."""
    folder = home.begun(home.folder / f"run-{name}-{engine}-{processes}")
    settings = [f"training.engine={engine}", *options]
    sets = [word for setting in settings for word in ("--set", setting)]
    hook = Hooks((Smooth(), fault) if fault else (Smooth(),))
    command = run(
        ["apply", home.recipe(name, passes), "--run-dir", folder, "--quiet", *sets],
        folder.with_name(folder.name + "-output"),
        processes=processes,
        hooks=dict.fromkeys(range(processes), hook),
    )
    if not torch.cuda.is_available():  # libraries of a card have remarks of their own
        assert command.errors() == [""] * processes
    return folder


def difference(start: Path, one: Path, other: Path) -> Difference:
    """How far two runs of one recipe are apart; `start` holds the transformer that they began with."""
    logged = weights = way = 0.0
    compared = 0
    before = weights_of(start)
    for first, second in zip(passes_of(one), passes_of(other), strict=True):
        for file in first.glob("metrics.jsonl"):
            logs = [list(map(json.loads, path.read_text().splitlines())) for path in (file, second / file.name)]
            compared += len(logs[0])
            logged = max(logged, apart(*logs))
        found = weights_of(first), weights_of(second)
        assert found[0].keys() == found[1].keys()
        if found[0]:
            if (first / "metrics.jsonl").exists():
                way += moved(before, found[0])
            before = found[0]
            weights = max(weights, *(_relative(rms(value - found[1][name]), way) for name, value in found[0].items()))
    assert compared
    return Difference(logged, weights)


def passes_of(folder: Path) -> list[Path]:
    """The folders of a run's passes, in their order; they may lie in a store."""
    return [entry.folder for entry in RunDirectory(folder).entries()]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the transformer in a pass's folder, in fp64, so that comparing rounds nothing; empty where it has none."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("transformer/*.safetensors"):
        found |= {name: value.double() for name, value in load_file(file).items()}
    return found


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> float:
    """Root mean square of the way from one set of weights to another, over the tensors that both have."""
    both = [name for name in after if name in before and after[name].shape == before[name].shape]
    return rms(torch.cat([(after[name] - before[name]).flatten() for name in both]))


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def apart(log: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> float:
    """The largest difference of two logs, each figure relative to the largest value that it has."""
    scale: dict[str, float] = {}
    for line in log:
        for key, value in line.items():
            # The drift is itself a relative difference.
            scale[key] = 1.0 if key == "drift" else max(scale.get(key, 0.0), abs(value))
    worst = 0.0
    for left, right in zip(log, other, strict=True):
        assert left.keys() == right.keys()
        worst = max(worst, *(_relative(abs(value - right[key]), scale[key]) for key, value in left.items()))
    return worst


def _relative(difference: float, scale: float) -> float:
    return difference / scale if difference else 0.0
