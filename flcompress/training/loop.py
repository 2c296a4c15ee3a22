"""The one training loop. Objectives plug in as a function of the step; everything else here is bookkeeping."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from flcompress.distributed.world import World
from flcompress.draws import Draws, seed_of
from flcompress.errors import Preempted, RequestError, TrainingError
from flcompress.files import append_line, lines_of, sync, write_text
from flcompress.training.checkpoint import Checkpoints, Kind
from flcompress.training.engines import Engine
from flcompress.training.role import Trained
from flcompress.training.watching.monitor import BREACHES_FILE, REDRAWS_FILE, Watch
from flcompress.training.watching.strips import STRIPS, strip_of
from flcompress.training.watching.trackers import figures_of, trackers

METRICS_FILE = "metrics.jsonl"

TrainStep = Callable[[int, Draws], Mapping[str, float]]


def train(
    train_step: TrainStep,
    roles: Sequence[Trained],
    *,
    engine: Engine,
    name: str,
    steps: int,
    batch: int,
    watch: Watch | None = None,
) -> int:
    """Run `train_step` for `steps` steps; go on from the last checkpoint in the work's directory if there is one.

    Every process of the work's world calls it, with the same arguments.

    Args:
        train_step: does the updates of one step with the given draws and returns what to log: means over this
            process's samples.
        roles: the models it trains; they are checkpointed together.
        engine: theirs. Its work's directory holds `metrics.jsonl`, one object a step, and the checkpoints.
        name: seeds the draws, with the recipe's seed and the step: a resumed run draws the same.
        steps: number of steps.
        batch: samples of a step, over all processes.
        watch: looks before the first step, every so many steps and after the last, and judges these figures and those
            of every step.

    Returns:
        The step whose weights the roles have: the last one, or the best look's where the watch sent them back to it.

    Raises:
        RequestError: the processes do not divide the batch, or the checkpoint was written by others.
        TrainingError: a loss was not finite or the watch said stop. The last checkpoint stays.
        Preempted: SIGTERM was received; a checkpoint was written.
    """
    work = engine.work
    world = work.world
    if batch % world.size:
        raise RequestError(f"{name}: batch {batch} given, expected a multiple of the {world.size} processes")
    checkpoints = Checkpoints(work.directory, world, engine.layout, work.say)
    log, redraws = work.directory / METRICS_FILE, work.directory / REDRAWS_FILE
    start = _restore(checkpoints, roles)
    if world.main:
        work.directory.mkdir(parents=True, exist_ok=True)
        for file in (log, redraws, work.directory / BREACHES_FILE):
            _truncate(file, start)
    logged = _logged(log) if world.main else []
    if watch is not None:
        watch.resume(logged)

    def write(record: Mapping[str, float]) -> None:
        if world.main:
            append_line(log, json.dumps(record))
            for tracker in tracked:
                tracker.log(int(record["step"]), figures_of(record))

    def look(step: int) -> bool:
        """Whether to go back to the best look."""
        if watch is None or not (step in (0, steps) or step % watch.every == 0):
            return False
        world.heartbeat(f"held-out figures of step {step}")
        with engine.forward_mode(), world.exchanging():
            figures, again = watch.look(step), watch.again(step)
        if figures:
            write({"step": step, **figures})
        if again.draws and world.main:
            append_line(redraws, json.dumps({"step": step, **asdict(again)}))
        strip = strip_of(work.directory, step)
        for tracker in tracked if strip.exists() else ():
            tracker.picture(step, STRIPS, strip)
        back = watch.judge(step, figures, again)
        if watch.best[0] == step > 0:
            checkpoints.save(step, _stored(roles), "best")
        return back

    saved = time.monotonic()
    with _termination(name, world) as asked, trackers(work, name, start, logged) as tracked:
        if start == 0:
            look(0)
        for step in range(start + 1, steps + 1):
            world.heartbeat(f"step {step}")
            draws = Draws(work.seed, name, step, batch=batch, rank=world.rank, processes=world.size)
            torch.manual_seed(seed_of(work.seed, name, step, "model", world.rank))  # dropout, where a model has it
            with engine.forward_mode(), world.exchanging():
                values = dict(train_step(step, draws))
            due = time.monotonic() - saved >= work.checkpoint_seconds
            agreed = world.all_mean({**values, _SAVE: float(due and world.main), _END: float(asked.is_set())})
            save, end = agreed.pop(_SAVE) > 0, agreed.pop(_END) > 0
            write({"step": step, **agreed})
            work.progress(step, steps, agreed)
            if (watch is not None and watch.judge(step, agreed)) or look(step):
                return _back_to_best(checkpoints, roles)
            if step == steps or save or end:
                if world.main:
                    for file in filter(Path.exists, (log, redraws)):
                        sync(file)  # what was logged before a checkpoint must not be lost where that is kept
                checkpoints.save(step, _stored(roles))
                saved = time.monotonic()
            if end:
                raise Preempted(
                    f"{name}: ended by SIGTERM after step {step} of {steps}; a checkpoint was written, "
                    "the same command goes on from it"
                )
    return steps


_SAVE, _END = "save", "end"


def _stored(roles: Sequence[Trained]) -> dict[str, torch.Tensor]:
    return {f"{role.name}/{key}": value for role in roles for key, value in role.checkpoint().items()}


def _back_to_best(checkpoints: Checkpoints, roles: Sequence[Trained]) -> int:
    step = _restore(checkpoints, roles, "best")
    if step == 0:
        raise TrainingError(f"{checkpoints.directory}: the best look's checkpoint is gone or damaged; start this again")
    return step


def _restore(checkpoints: Checkpoints, roles: Sequence[Trained], kind: Kind = "step") -> int:
    step, tensors = checkpoints.load(kind)
    for role in roles if step else ():
        prefix = f"{role.name}/"
        role.restore({key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)})
    return step


@contextmanager
def _termination(name: str, world: World) -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        asked.set()
        world.ending()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():  # too late for the last step to see it; everything is saved
        raise Preempted(f"{name}: ended by SIGTERM after its last step; the same command goes on from there")


def _truncate(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps will be done, and logged, again.

    Without a checkpoint that is everything, what was held against step 0 too.
    """
    if log.exists():
        lines = lines_of(log.read_text(encoding="utf-8")) if step else []
        kept = [line for line in lines if line and _step(line) <= step]
        write_text(log, "".join(line + "\n" for line in kept))


def _logged(log: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in lines_of(log.read_text(encoding="utf-8"))] if log.exists() else []


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return 1 << 62  # the last line of a killed run can be cut in half
