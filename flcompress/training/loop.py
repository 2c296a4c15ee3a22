"""The training loop. Objectives plug in as a function of the step; everything else here is bookkeeping."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from flcompress.core.records import MetricsLine, RedrawsLine
from flcompress.distributed.world import World
from flcompress.draws import Draws, seed_of
from flcompress.errors import Preempted, RequestError, TrainingError
from flcompress.files import append_line, lines_of, sync, write_text
from flcompress.models.network import attention_with_gradients
from flcompress.training.background import Background
from flcompress.training.checkpoint import Checkpoints, Kind
from flcompress.training.engines import Engine
from flcompress.training.feed import Feed
from flcompress.training.parts import Part
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import BREACHES_FILE, REDRAWS_FILE, Watch
from flcompress.training.watching.strips import STRIPS, strip_of
from flcompress.training.watching.trackers import Tracker, trackers

METRICS_FILE = "metrics.jsonl"

SAVE_SHARE = 20.0
"""How many times longer than the last checkpoint took the training goes on before the next: at most 5 % go there."""

TrainStep = Callable[[int, Draws], Mapping[str, float]]


def train(
    train_step: TrainStep,
    roles: Sequence[TrainedRole],
    *,
    engine: Engine,
    name: str,
    steps: int,
    batch: int,
    watch: Watch | None = None,
    feed: Feed | None = None,
) -> int:
    """Run `train_step` for `steps` steps; resume from the last checkpoint in the context's directory if there is one.

    Every process of the engine's world calls it, with the same arguments.

    Args:
        train_step: does the updates of one step with its draws and returns what to log: means over this process's
            samples.
        roles: the models it trains; they are checkpointed together.
        engine: theirs. Its context's directory holds `metrics.jsonl`, one object a step, and the checkpoints.
        name: seeds the draws, with the recipe's seed and the step: a resumed run draws the same.
        steps: number of steps.
        batch: samples of a step, over all processes.
        watch: makes held-out evaluations before the first step, at its interval and after the last step, and judges
            their figures and those of every step.
        feed: prepares the inputs that the updates take.

    Returns:
        The step whose weights the roles have: the last one, or the best evaluation's if the watch rolled back.

    Raises:
        RequestError: the processes do not divide the batch, or another release wrote the checkpoint.
        TrainingError: a loss was not finite or the watch said stop. The last checkpoint stays.
        Preempted: SIGTERM was received; a checkpoint was written.
    """
    context = engine.context
    world = context.world
    if batch % world.data_size:
        raise RequestError(f"{name}: batch {batch} given, expected a multiple of its {world.data_size} shares")
    run = _Run(train_step, roles, engine, name, batch, watch)
    start, logged = run.resume()
    remaining = (run.draws(step) for step in range(start + 1, steps + 1))
    with (
        _termination(name, world) as preempted,
        attention_with_gradients(context.attention),
        trackers(context, name, start, logged) as run.trackers,
        feed.preparing(remaining) if feed is not None else nullcontext(),
    ):
        if start == 0:
            run.evaluate(0)
        for step in range(start + 1, steps + 1):
            figures, due, end = run.step(step, preempted)
            run.record(step, figures)
            context.progress(step, steps, figures)
            if run.judge(step, figures, last=step == steps):
                return run.roll_back()
            if step == steps or due or end:
                run.save(step, wait=step == steps or end)
            if end:
                raise Preempted(
                    f"{name}: ended by SIGTERM after step {step} of {steps}; a checkpoint was written, "
                    "the same command resumes from it"
                )
    return steps


class _Run:
    """The bookkeeping around the steps of one training: draws, logs, held-out evaluations and checkpoints.

    Args: those of `train`.

    Attributes:
        trackers: where figures go in addition to `metrics.jsonl`.
    """

    trackers: Sequence[Tracker] = ()

    def __init__(
        self,
        train_step: TrainStep,
        roles: Sequence[TrainedRole],
        engine: Engine,
        name: str,
        batch: int,
        watch: Watch | None,
    ) -> None:
        self._train_step, self._roles, self._engine = train_step, roles, engine
        self._name, self._batch, self._watch = name, batch, watch
        self._context = context = engine.context
        self._world = context.world
        self._log, self._redraws = context.directory / METRICS_FILE, context.directory / REDRAWS_FILE
        self._checkpoints = Checkpoints(context.directory, context.world, context.engine, context.say)
        self._background = Background(self._checkpoints) if context.background_checkpoints else None
        self._saved, self._save_seconds = time.monotonic(), 0.0

    def resume(self) -> tuple[int, list[dict[str, float]]]:
        """Take up the last checkpoint; return its step, 0 without one, and what was logged up to there."""
        start = self._restore("step")
        logged: list[dict[str, float]] = []
        if self._world.main:
            self._context.directory.mkdir(parents=True, exist_ok=True)
            for file in (self._log, self._redraws, self._context.directory / BREACHES_FILE):
                _truncate(file, start)
            logged = _logged(self._log)
        if self._watch is not None:
            self._watch.resume(logged)
        self._saved = time.monotonic()
        return start, logged

    def draws(self, step: int) -> Draws:
        """Return this process's draws of a step."""
        share = {"rank": self._world.data_rank, "processes": self._world.data_size}
        return Draws(self._context.seed, self._name, step, batch=self._batch, **share)

    def step(self, step: int, preempted: threading.Event) -> tuple[dict[str, float], bool, bool]:
        """Train one step; return its figures, and whether to checkpoint and to end after it, as all processes agree."""
        context, world = self._context, self._world
        world.heartbeat(f"step {step}")
        torch.manual_seed(seed_of(context.seed, self._name, step, "model", world.rank))  # for a model's dropout
        with self._engine.forward_mode(), world.exchanging():
            values = dict(self._train_step(step, self.draws(step)))
        due = time.monotonic() - self._saved >= self.checkpoint_interval
        written = self._background is not None and self._background.written
        agreed = world.all_mean(
            {**values, _SAVE: float(due and world.main), _END: float(preempted.is_set()), _WRITTEN: float(written)}
        )
        save, end, everywhere = agreed.pop(_SAVE) > 0, agreed.pop(_END) > 0, agreed.pop(_WRITTEN) == 1.0
        if everywhere:
            self._finish()
        return agreed, save, end

    @property
    def checkpoint_interval(self) -> float:
        """Seconds between two checkpoints: more than the setting where they take long; 0 stores every step."""
        setting = self._context.checkpoint_seconds
        return max(setting, SAVE_SHARE * self._save_seconds) if setting else 0.0

    def record(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a step or of an evaluation to the log and the trackers."""
        if self._world.main:
            append_line(self._log, MetricsLine(step=step, **figures).line())
            for tracker in self.trackers:
                tracker.log(step, figures)

    def judge(self, step: int, figures: Mapping[str, float], *, last: bool) -> bool:
        """Judge a step, and evaluate after it where that is due; return whether to roll back to the best evaluation."""
        if (watch := self._watch) is None or watch.judge(step, figures):
            return watch is not None
        return (last or step % watch.every == 0) and self.evaluate(step)

    def evaluate(self, step: int) -> bool:
        """Make a held-out evaluation and judge it; return whether to roll back to the best one."""
        if (watch := self._watch) is None:
            return False
        self._world.heartbeat(f"held-out figures of step {step}")
        with self._engine.forward_mode(), self._world.exchanging():
            figures, redraws = watch.evaluate(step), watch.redraw(step)
        if figures:
            self.record(step, figures)
        if redraws.draws and self._world.main:
            append_line(self._redraws, RedrawsLine(step=step, **asdict(redraws)).line())
        strip = strip_of(self._context.directory, step)
        for tracker in self.trackers if strip.exists() else ():
            tracker.picture(step, STRIPS, strip)
        back = watch.judge(step, figures, redraws)
        if watch.best[0] == step > 0:
            self._save(step, "best")
        return back

    def save(self, step: int, *, wait: bool) -> None:
        """Write the checkpoint of a step, or begin to if the training writes in the background and need not wait."""
        began = time.monotonic()
        self._finish()
        if self._background is not None and not wait:
            self._background.begin(step, self._parts())
        else:
            self._sync_logs()
            self._save(step, "step")
        self._saved = time.monotonic()
        self._save_seconds = self._saved - began

    def _finish(self) -> None:
        """Put a checkpoint in place that is being written in the background, if any."""
        if self._background is not None:
            self._sync_logs()
            self._background.finish()

    def _sync_logs(self) -> None:
        """Make what was logged last: it must not be lost where a later checkpoint is kept."""
        if self._world.main:
            for file in filter(Path.exists, (self._log, self._redraws)):
                sync(file)

    def roll_back(self) -> int:
        """Take up the best evaluation's checkpoint; return its step."""
        self._finish()
        step = self._restore("best")
        if step == 0:
            folder = self._checkpoints.directory
            raise TrainingError(f"{folder}: the best evaluation's checkpoint is gone or damaged; start this again")
        return step

    def _save(self, step: int, kind: Kind) -> None:
        self._checkpoints.save(step, self._parts(), kind)

    def _parts(self) -> dict[str, Part]:
        return {name: part for role in self._roles for name, part in role.parts().items()}

    def _restore(self, kind: Kind) -> int:
        step, stored = self._checkpoints.load(kind)
        if stored is not None:
            for role in self._roles:
                role.restore(stored)
        return step


_SAVE, _END, _WRITTEN = "save", "end", "written"


@contextmanager
def _termination(name: str, world: World) -> Iterator[threading.Event]:
    """Yield an event that SIGTERM sets, instead of ending the process at once."""
    preempted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield preempted
        return

    def preempt(number: int, frame: object) -> None:
        preempted.set()
        world.ending()

    before = signal.signal(signal.SIGTERM, preempt)
    try:
        yield preempted
    finally:
        signal.signal(signal.SIGTERM, before)
    if preempted.is_set():  # too late for the last step to see it; everything is saved
        raise Preempted(f"{name}: ended by SIGTERM after its last step; the same command resumes from there")


def _truncate(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps will be trained, and logged, again.

    Without a checkpoint that is everything, including breaches recorded at step 0.
    """
    if log.exists():
        lines = lines_of(log.read_text(encoding="utf-8")) if step else []
        kept = [line for line in lines if line and _step(line) <= step]
        write_text(log, "".join(line + "\n" for line in kept))


def _logged(log: Path) -> list[dict[str, float]]:
    return [line.dump() for line in MetricsLine.read_lines(log)]


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return 1 << 62  # the last line of a killed run can be cut in half
