"""Kill a training at random moments, give the same command again, and compare what comes out with an unbroken run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.training.home import Home
from tests.training.processes import PATIENCE, CountWrites, DieAtWrite, Hook, run, start
from tests.training.toy import weights

STEPS = 7
SETTINGS = "schedule: linear, weight_decay: 0.1, betas: [0.8, 0.99], clip_grad_norm: 0.5, ema_start: 2"
"""All that a step depends on beside its number has to be in the checkpoint, and the rest not to remember anything."""


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        rank: of the process that was killed.
        when: "write N" (before its N-th change of a file below the run directory) or "N ms" after the start.
        found: what the run directory held then: "start", "step N", "checkpoint" (half written) or "end".
    """

    rank: int
    when: str
    found: str


def killed(home: Home, engine: str, kills: int, seed: int) -> Iterator[Kill]:
    """Kill and resume a training until it was hit `kills` times; AssertionError where its result is another.

    After every kill the same command is given again, and is killed again; a run that came through is compared with the
    unbroken one bit for bit, weights and logged figures, and the next begins.
    """
    draw = random.Random(f"{engine} {seed}")
    processes = 1 if engine == "local" else 2
    recipe = home.recipe("killed", [f"toy: {{steps: {STEPS}, batch: 4, {SETTINGS}}}"])

    def command(folder: Path) -> list[str | Path]:
        settings = f"training.engine={engine}", "training.checkpoint_seconds=0", "training.micro_batch=1"
        return ["apply", recipe, "--run-dir", folder, "--quiet", *(w for one in settings for w in ("--set", one))]

    output = home.folder / f"killed-{engine}-output"
    whole, counts = home.begun(home.folder / f"whole-{engine}"), output / "counts"
    counts.mkdir(parents=True)
    counting: dict[int, Hook] = {rank: CountWrites(str(whole), str(counts / str(rank))) for rank in range(processes)}
    run(["--version"], output)  # the fork server is there before anything is timed
    began = time.monotonic()
    run(command(whole), output, processes=processes, hooks=counting)
    seconds = time.monotonic() - began
    writes = [int(path.read_text()) if path.exists() else 0 for path in (counts / str(rank) for rank in counting)]
    done = number = 0
    while done < kills:
        number += 1
        folder = home.begun(home.folder / f"killed-{engine}-{number}")
        for _ in range(4):  # of one run directory; then it may end
            rank = draw.randrange(processes)
            by_write = draw.random() < 0.6 and writes[rank] > 0
            at = draw.randint(1, writes[rank]) if by_write else 0
            hooks: dict[int, Hook] = {rank: DieAtWrite(str(folder), at)} if by_write else {}
            started = start(command(folder), output, processes=processes, hooks=hooks)
            after = draw.uniform(0.0, seconds)
            if by_write:
                started.wait_any(PATIENCE)
            else:
                started.wait_any(after)
                started.signal(rank, signal.SIGKILL)
            started.wait(2)
            for other in range(processes):  # what a launcher does; those that were still to meet wait for it
                started.signal(other, signal.SIGTERM)
            statuses = started.wait()
            if None in statuses:
                started.show_stacks()
            started.kill()
            assert None not in statuses, f"process {statuses.index(None)} is left: {started.errors()}"
            if statuses[rank] == -signal.SIGKILL and done < kills:
                done += 1
                yield Kill(rank, f"write {at}" if by_write else f"{after * 1000:.0f} ms", _found(folder))
            elif statuses == [0] * processes:
                break
        run(command(folder), output, processes=processes)
        assert weights(folder) == weights(whole), f"{folder}: other weights than {whole}"
        logs = [next(one.glob("passes/*-toy-*/metrics.jsonl")).read_text() for one in (folder, whole)]
        assert logs[0] == logs[1]
        assert not list(folder.rglob(".work-*"))


def _found(folder: Path) -> str:
    if list(folder.glob("passes/01-toy-*")):
        return "end"
    inside = [path.name for path in folder.glob("passes/.work-*/checkpoints/*")]
    if any(name.startswith(".work-") for name in inside):
        return "checkpoint"
    return f"step {int(max(inside)[5:])}" if inside else "start"
