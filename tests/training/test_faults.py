"""The worst that can happen to one of two processes: one line, exit 1, nothing left running, nothing lost."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.training import toy
from tests.training.faulty import AGAIN, command, lines, met, resumed, steps
from tests.training.home import Home
from tests.training.processes import PATIENCE, run, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_process_is_named(home: Home, tmp_path: Path, whole: bytes, rank: int) -> None:
    """Process 0 also keeps the store in which the processes meet: the others see it stop answering."""
    folder = home.begun(tmp_path / "here/run")
    started = start(
        command(home, folder, "ddp", "toy: {steps: 6}", "training.timeout=20"),
        tmp_path / "output",
        processes=2,
        environment={toy.FAULT: f"stop:{rank}:4"},
    )
    started.wait_any(PATIENCE)
    other = 1 - rank
    assert started.processes[other].exitcode == 1
    named = f"process {rank} (last: step 4) of 2 has not moved for 20 s (training.timeout)"
    if rank == 0:
        named = "the process that all others meet at has not answered for 20 s"
    assert lines(started) == [f"error: {named}; {AGAIN}"]
    started.signal(rank, signal.SIGCONT)  # a launcher would kill it; should it wake up, it ends too
    assert None not in started.wait()
    started.kill()
    assert resumed(home, folder) == whole


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_is_named(home: Home, tmp_path: Path, whole: bytes, rank: int) -> None:
    ended = met(home, home.begun(tmp_path / "here/run"), f"exit:{rank}:4")
    assert [process.exitcode for process in ended.processes][rank] == 7
    assert [process.exitcode for process in ended.processes][1 - rank] == 1
    (line,) = lines(ended)
    expected = "process 1 (last: step 4) of 2 ended or cannot be reached; "
    if rank == 0:
        expected = (
            "process 1 of 2 lost the one that all meet at: the launcher, or process 0, ended or cannot be reached; "
        )
    assert line.startswith("error: " + expected + AGAIN)
    assert resumed(home, tmp_path / "here/run") == whole


def test_a_process_that_dies_in_a_checkpoint_does_not_keep_the_others(home: Home, tmp_path: Path) -> None:
    """They wait for its word, not in an exchange that breaks; the launcher's SIGTERM must end them all the same."""
    folder = home.begun(tmp_path / "here/run")
    given = {toy.FAULT: "exit-in-checkpoint:1:4"}
    started = start(command(home, folder, "zero2"), tmp_path / "output", processes=2, environment=given)
    started.wait_any(PATIENCE)
    started.signal(0, signal.SIGTERM)
    assert started.wait() == [1, 7]
    assert lines(started) == [
        "error: process 1 (last: checkpoint of step 4) of 2 has not moved for 7 s, and this command was asked to end; "
        + AGAIN
    ]


@pytest.mark.parametrize("engine", ["ddp", "zero2", "fsdp2"])
def test_a_loss_that_is_not_finite_in_one_process_stops_all(home: Home, tmp_path: Path, engine: str) -> None:
    folder = home.begun(tmp_path / "here/run")
    ended = met(home, folder, "nan:1:4", engine)
    assert [process.exitcode for process in ended.processes] == [1, 1]
    assert lines(ended) == [
        "error: critic: the loss is nan at update 4; expected a finite number. Stopped before the optimiser step; "
        "the last good checkpoint is kept. Lower learning_rate."
    ]
    assert steps(folder) == ["step-00000002", "step-00000003"]
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "failed"


def test_a_mistake_in_the_code_of_one_process_ends_all(home: Home, tmp_path: Path) -> None:
    ended = met(home, home.begun(tmp_path / "here/run"), "error:1:4")
    assert [process.exitcode for process in ended.processes] == [1, 1]
    assert ended.errors()[0] == ""
    assert ended.errors()[1].endswith("ValueError: a mistake in the code\n")


def test_sigterm_in_one_process_saves_and_ends_all(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    ended = met(home, folder, "term:1:4", "ddp", "training.checkpoint_seconds=1e9")
    assert [process.exitcode for process in ended.processes] == [75, 75]
    assert lines(ended) == [
        "error: toy: ended by SIGTERM after step 4 of 6; a checkpoint was written, the same command resumes from it"
    ]
    assert steps(folder) == ["step-00000004"]
    assert resumed(home, folder) == whole


def test_sigterm_in_the_last_step_is_not_lost(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    ended = met(home, folder, "term:0:6")
    assert [process.exitcode for process in ended.processes] == [75, 75]
    assert resumed(home, folder) == whole


def test_an_interrupt_is_said_once(home: Home, tmp_path: Path, whole: bytes) -> None:
    ended = met(home, home.begun(tmp_path / "here/run"), "interrupt:1:4")
    assert [process.exitcode for process in ended.processes] == [130, 130]
    assert lines(ended) == ["interrupted; the same command resumes from here"]
    assert resumed(home, tmp_path / "here/run") == whole


def test_a_clock_that_runs_backwards(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    hooks = dict.fromkeys(range(2), toy.backwards)
    run(command(home, folder), tmp_path / "output", processes=2, hooks=hooks)
    assert toy.weights(folder) == whole
    events = [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert events == ["start", "begin", "pass", "done"]
