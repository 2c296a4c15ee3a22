"""A training that other processes, more or fewer or under another engine, take up: same tensors, same losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from flcompress.training import loop
from flcompress.training.checkpoint import MANIFEST
from flcompress.training.parts import Part, StoredParts
from tests.fixtures.rounding import rounding
from tests.training import toy
from tests.training.comparing import Smooth, apart
from tests.training.faulty import command, lines, steps
from tests.training.home import Home
from tests.training.processes import start

pytestmark = pytest.mark.slow

WIDTH, BATCH = 7, 12
"""Rows of 8 and of 7: neither two nor three processes divide both."""
STEPS = 8
MOMENTS, COPIES = "offload=[moments]", "shard_size=2"
TOY = f"toy: {{steps: {STEPS}, batch: {BATCH}, width: {WIDTH}}}"


@dataclass(frozen=True)
class StoreAgain:
    """Processes that store what they hold as soon as they have resumed."""

    folder: Path

    def __call__(self) -> None:
        Smooth()()
        resume = loop._Run.resume

        def resume_and_store(run: loop._Run) -> tuple[int, list[dict[str, float]]]:
            resumed = resume(run)
            parts = {name: part for role in run._roles for name, part in role.parts().items()}
            replace(run._checkpoints, directory=self.folder).save(resumed[0], parts)
            return resumed

        vars(loop)["_Run"].resume = resume_and_store


def apply(
    home: Home,
    folder: Path,
    engine: str,
    processes: int,
    outputs: Path,
    end: int | None = None,
    more: Sequence[str] = (),
) -> list[str]:
    """The lines of a command that goes on to a step, or to the end."""
    settings = ["training.checkpoint_seconds=1e9", *(f"training.{setting}" for setting in more)]
    settings += ["training.processes=1"] if processes == 1 else []
    started = start(
        command(home, folder, engine, TOY, *settings),
        outputs,
        processes=processes,
        hooks=dict.fromkeys(range(processes), StoreAgain(outputs)),
        environment={toy.FAULT: f"term:0:{end or 0}"},
    )
    assert started.wait() == [75 if end else 0] * processes, started.errors()
    return lines(started)


def files(folder: Path) -> list[Path]:
    """The files of the newest checkpoint in a folder."""
    checkpoint = max(folder.glob("checkpoints/step-*"))
    return [checkpoint / name for name in json.loads((checkpoint / MANIFEST).read_text())["files"]]


def whole(folder: Path) -> dict[str, list[float]]:
    """Every tensor of the newest checkpoint in a folder."""
    stored = StoredParts(folder, files(folder))
    tensors = {name: torch.empty(total, dtype=torch.float64) for name, total in stored._totals.items()}
    for name, tensor in tensors.items():
        stored.fill(name, Part(tensor))
    return {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def unbroken(home: Home) -> Path:
    folder = home.begun(home.folder / "elastic/run")
    apply(home, folder, "local", 1, home.folder / "elastic/output")
    return folder


@pytest.mark.parametrize(
    "chain",
    [
        [("local", 1), ("ddp", 2), ("ddp", 3, MOMENTS)],
        [("fsdp2", 1), ("fsdp2", 2, MOMENTS), ("fsdp2", 4, COPIES), ("fsdp2", 3)],
        [("fsdp2", 2), ("zero1", 1), ("zero3", 3), ("zero2", 2)],
    ],
    ids=["copies", "rows", "ranges"],
)
def test_others_take_up_a_training(
    home: Home, tmp_path: Path, unbroken: Path, chain: Sequence[tuple[Any, ...]]
) -> None:
    folder = home.begun(tmp_path / "run/run")
    for number, (engine, processes, *more) in enumerate(chain, start=1):
        end = 2 * number if number < len(chain) else None
        outputs = tmp_path / str(number)
        before = {} if number == 1 else whole(next(folder.glob("passes/.work-*-toy-*")))
        assert len(apply(home, folder, engine, processes, outputs, end, more)) == (1 if end else 0)
        if COPIES in more:  # one of the two copies is stored
            assert {file.name for file in files(outputs)} == {"rank-0.safetensors", "rank-1.safetensors"}
        if number > 1:
            held = whole(outputs)
            assert held == before  # bit for bit
            names = {name.split(".")[0] + "." + name.split(".")[1] for name in held if "optimizer." in name}
            assert names == {
                f"{role}/optimizer.{moment}"
                for role in ("student", "critic")
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }
    logs = [
        [json.loads(line) for line in next(one.glob("passes/*-toy-*/metrics.jsonl")).read_text().splitlines()]
        for one in (folder, unbroken)
    ]
    # Layers of 8 and 7 channels, forward and backward, and 12 samples, in each of two networks.
    bound = rounding(STEPS * 2 * 3 * (8 + WIDTH + WIDTH + BATCH))
    assert apart(*logs) < bound
    found, expected = load(toy.weights(folder)), load(toy.weights(unbroken))
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < bound, name
    assert steps(folder) == []
