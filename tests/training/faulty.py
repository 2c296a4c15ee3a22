"""A training in which a fault is met, the lines that it ends with, and the same command again."""

from __future__ import annotations

from pathlib import Path

from tests.training import toy
from tests.training.home import Home
from tests.training.processes import Command, run, start

AGAIN = "give the same command again: it resumes from the last checkpoint"


def command(home: Home, folder: Path, engine: str = "ddp", passes: str = "toy: {steps: 6}", *more: str) -> list[str]:
    recipe = home.recipe("faults", [passes])
    settings = f"training.engine={engine}", "training.checkpoint_seconds=0", *more
    return ["apply", str(recipe), "--run-dir", str(folder), "--quiet", *(w for one in settings for w in ("--set", one))]


def met(home: Home, folder: Path, fault: str, engine: str = "ddp", *more: str, processes: int = 2) -> Command:
    """A run in which the fault is met, ended."""
    started = start(
        command(home, folder, engine, "toy: {steps: 6}", *more),
        folder.parent.parent / "output",
        processes=processes,
        environment={toy.FAULT: fault},
    )
    started.wait()
    return started


def lines(ended: Command) -> list[str]:
    """What all processes said, line by line."""
    return [line for text in ended.errors() for line in text.splitlines()]


def steps(folder: Path) -> list[str]:
    """Names of the checkpoints, except for the best evaluation's."""
    names = (path.name for path in folder.glob("passes/.work-*/checkpoints/*"))
    return sorted(name for name in names if not name.startswith("best-"))


def resumed(home: Home, folder: Path, engine: str = "ddp", processes: int = 2) -> bytes:
    run(command(home, folder, engine), folder.parent / "again", processes=processes)
    return toy.weights(folder)
