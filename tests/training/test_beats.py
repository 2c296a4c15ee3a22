"""Whatever takes long says that it moves on: `training.timeout` ends what hangs, and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

from flcompress.core import registry
from flcompress.diffusion.network import Network
from flcompress.distributed.world import World
from flcompress.driver.manager import apply
from flcompress.progress import QuietDisplay
from flcompress.reporting.reading import read_run
from flcompress.training.watching.held_out import HeldOutELBO, HeldOutLoss
from tests.training.home import Home
from tests.training.processes import PATIENCE, start

pytestmark = pytest.mark.e2e

EVERY_PASS = [
    "stochastic-depth: {remove: 0.3, by: middle, steps: 2, batch: 2}",
    "prune: {remove: 0.3, by: middle}",
    "dmd: {steps: 2, critic_updates: 3, batch: 2, student_steps: 4, inter_cfg: [2, 3]}",
]
SETTINGS = [
    "sampling.num_inference_steps=5",
    "training.health.samples=2",
    "training.health.every=1",
    "training.checkpoint_seconds=0",
]


def test_no_more_than_two_network_calls_pass_without_a_beat(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where the main process works alone. Guided sampling calls twice for one prediction."""
    seen: list[str] = []
    beat, alone, forward = World.heartbeat, World.main_only, WanTransformer3DModel.forward

    def called(self: Any, *given: Any, **named: Any) -> Any:
        seen.append("call")
        return forward(self, *given, **named)

    def beaten(self: World, what: str = "") -> None:
        seen.append("beat")
        beat(self, what)

    def left(self: World, what: str) -> None:
        seen.append("alone")
        alone(self, what)

    monkeypatch.setattr(WanTransformer3DModel, "forward", called)
    monkeypatch.setattr(World, "heartbeat", beaten)
    monkeypatch.setattr(World, "main_only", left)
    recipe = home.recipe("beats", EVERY_PASS)
    apply(recipe, tmp_path / "run", overrides=SETTINGS, display=QuietDisplay(), device="cpu")
    between = re.split("b+", re.sub("ac*", "b", "".join(one[0] for one in seen)))
    assert len(between) > 100
    assert max(map(len, between)) <= 2


def test_the_longest_time_without_a_beat_is_noted(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the limit can be set; what the main process does alone does not count, since the others wait."""
    from tests.training.toy import Toy

    monkeypatch.setitem(registry.PASSES, "toy", f"{Toy.__module__}:Toy")
    trained = Toy.apply
    passed: list[float] = []

    def slow(self: Toy, program: Any, work: Any) -> Any:
        time.sleep(1.5)
        began = time.monotonic()
        work.world.heartbeat("a slow step")
        time.sleep(0.5)
        work.world.heartbeat("another")
        passed.append(time.monotonic() - began)
        work.world.main_only("saving")
        time.sleep(1.5)
        return trained(self, program, work)

    monkeypatch.setattr(Toy, "apply", slow)
    run = apply(home.recipe("noted", ["toy: {steps: 1}"]), tmp_path / "run", display=QuietDisplay(), device="cpu")
    (event,) = [one for one in run.journal() if one.event == "pass"]
    assert event.more["longest_beat"]["at"] == "a slow step"
    assert 0.5 <= event.more["longest_beat"]["seconds"] < passed[0] + 1e-3  # to which it is rounded
    assert read_run(run.path).journal


def slow_looks(stop_at: int = 0) -> None:
    """Every network call of a held-out loss takes 0.8 s; one of them, by number, never returns."""
    score, forward = HeldOutELBO.__call__, WanTransformer3DModel.forward
    scoring, calls = False, 0

    def scored(self: HeldOutELBO, network: Network) -> HeldOutLoss:
        nonlocal scoring
        scoring = True
        try:
            return score(self, network)
        finally:
            scoring = False

    def slow(self: Any, *given: Any, **named: Any) -> Any:
        nonlocal calls
        if scoring:
            calls += 1
            if calls == stop_at:
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(0.8)
        return forward(self, *given, **named)

    HeldOutELBO.__call__ = scored  # type: ignore[method-assign]
    WanTransformer3DModel.forward = slow


def hanging() -> None:
    """In the first look of the training; the three calls before score the original."""
    slow_looks(stop_at=6)


def command(home: Home, folder: Path) -> list[str]:
    recipe = home.recipe("slow", ["stochastic-depth: {remove: 0.3, by: middle, steps: 1, batch: 2}"])
    settings = "training.engine=ddp", "training.timeout=4", "training.micro_batch=1"
    return ["apply", str(recipe), "--run-dir", str(folder), "--quiet", *(w for one in settings for w in ("--set", one))]


@pytest.mark.slow
def test_a_look_that_takes_longer_than_the_limit_is_not_ended(home: Home, tmp_path: Path) -> None:
    """Six calls of 0.8 s each, in each of two processes, under a limit of 4 s."""
    folder = home.begun(tmp_path / "run")
    hooks = dict.fromkeys(range(2), slow_looks)
    started = start(command(home, folder), tmp_path / "output", processes=2, hooks=hooks)
    assert started.wait() == [0, 0], started.errors()
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    (event,) = [one for one in events if one["event"] == "pass"]
    assert 0.8 <= event["longest_beat"]["seconds"] < 4.0


@pytest.mark.slow
def test_a_process_that_hangs_in_a_look_is_named(home: Home, tmp_path: Path) -> None:
    folder = home.begun(tmp_path / "run")
    started = start(command(home, folder), tmp_path / "output", processes=2, hooks={0: slow_looks, 1: hanging})
    started.wait_any(PATIENCE)
    assert started.processes[0].exitcode == 1
    (line,) = started.errors()[0].splitlines()
    assert line.startswith("error: process 1 (last: held-out figures of step 0) of 2 has not moved for 4 s")
    started.signal(1, signal.SIGCONT)
    assert None not in started.wait()
    started.kill()
