"""The worst that can happen to one of two processes: one line, exit 1, nothing left running, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.small_disk import small_disk
from tests.training import toy
from tests.training.home import Home
from tests.training.processes import Command, free_port, run, start

pytestmark = pytest.mark.slow
AGAIN = "give the same command again: it goes on from the last checkpoint"


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
    """What lies among the checkpoints, but for the best look's."""
    names = (path.name for path in folder.glob("passes/.work-*/checkpoints/*"))
    return sorted(name for name in names if not name.startswith("best-"))


@pytest.fixture(scope="module")
def whole(home: Home) -> bytes:
    folder = home.begun(home.folder / "faults-whole/run")
    run(command(home, folder), home.folder / "faults-output", processes=2)
    return toy.weights(folder)


def resumed(home: Home, folder: Path, engine: str = "ddp", processes: int = 2) -> bytes:
    run(command(home, folder, engine), folder.parent / "again", processes=processes)
    return toy.weights(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_process_is_named(home: Home, tmp_path: Path, whole: bytes, rank: int) -> None:
    """Process 0 also keeps the store in which the processes meet: the others see it stop answering."""
    folder = home.begun(tmp_path / "here/run")
    began = time.monotonic()
    started = start(
        command(home, folder, "ddp", "toy: {steps: 6}", "training.timeout=8"),
        tmp_path / "output",
        processes=2,
        environment={toy.FAULT: f"stop:{rank}:4"},
    )
    started.wait_any(90)
    assert time.monotonic() - began < 60
    other = 1 - rank
    assert started.processes[other].exitcode == 1
    named = f"process {rank} (last: step 4) of 2 has not moved for 8 s (training.timeout)"
    if rank == 0:
        named = "the process that all others meet at has not answered for 8 s"
    assert lines(started) == [f"error: {named}; {AGAIN}"]
    started.signal(rank, signal.SIGCONT)  # a launcher would kill it; should it wake up, it ends too
    assert None not in started.wait(60)
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
    started.wait_any(60)
    started.signal(0, signal.SIGTERM)
    assert started.wait(60) == [1, 7]
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
        "error: toy: ended by SIGTERM after step 4 of 6; a checkpoint was written, the same command goes on from it"
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
    assert lines(ended) == ["interrupted; the same command goes on from here"]
    assert resumed(home, tmp_path / "here/run") == whole


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_disk_that_fills_up(home: Home, tmp_path: Path, engine: str) -> None:
    """While the checkpoint of step 4 is written, by process 0 alone or by both."""
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = home.begun(disk / "run")
        ended = met(home, folder, "full:1:4", engine)
        assert [process.exitcode for process in ended.processes] == [1, 1]
        said = lines(ended)
        assert len(said) == 1, said
        assert said[0].endswith(
            "no space left on the disk; what was stored before is kept: free some space and give the same command again"
        )
        assert steps(folder) == ["step-00000002", "step-00000003"]
        (disk / "ballast").unlink()
        resumed(home, folder, engine)


def test_a_folder_that_may_not_be_written(home: Home, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = home.begun(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = met(home, folder, "none:0:0")
        assert [process.exitcode for process in ended.processes] == [2, 2]
        (line,) = lines(ended)
        assert line.startswith(f"error: {folder}/")
        assert line.endswith(": Read-only file system; make it writable, or choose another --run-dir")


def test_a_damaged_shard_met_on_the_way(home: Home, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for file in home.data.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    folder = home.begun(tmp_path / "here/run")
    recipe = home.recipe("damaged", ["toy: {steps: 6, reads_from: 4}"], data)
    arguments = ["apply", recipe, "--run-dir", folder, "--quiet", "--set", "training.engine=ddp", "--set"]
    ended = start(
        [*map(str, arguments), "training.checkpoint_seconds=0"],
        tmp_path / "output",
        processes=2,
        environment={toy.FAULT: "damage:0:3"},
    )
    ended.wait()
    assert [process.exitcode for process in ended.processes] == [2, 2]
    (line,) = lines(ended)
    assert line.startswith(f"error: {data}/clips-00000.safetensors: not a whole shard (")
    assert steps(folder) == ["step-00000002", "step-00000003"]


def test_a_clock_that_runs_backwards(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    hooks = dict.fromkeys(range(2), toy.backwards)
    run(command(home, folder), tmp_path / "output", processes=2, hooks=hooks)
    assert toy.weights(folder) == whole
    events = [json.loads(line)["event"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    assert events == ["start", "begin", "pass", "done"]


def test_two_runs_in_one_directory(home: Home, tmp_path: Path) -> None:
    folder = home.begun(tmp_path / "here/run")
    slow = "toy: {steps: 6}"
    first = start(
        command(home, folder, "ddp", slow), tmp_path / "one", processes=2, environment={toy.FAULT: "slow:0:4"}
    )
    end = time.monotonic() + 60
    while not steps(folder) and time.monotonic() < end:
        time.sleep(0.1)
    second = start(command(home, folder), tmp_path / "two", processes=2)
    assert second.wait() == [2, 2]
    first.kill()
    assert lines(second) == [
        f"error: {folder}: another flcompress is working in this run directory; wait for it or choose another --run-dir"
    ]


def test_another_number_of_processes(home: Home, tmp_path: Path, whole: bytes) -> None:
    """Whole copies go on with any number, equal but for the order of sums; shards are refused by name."""
    folder = home.begun(tmp_path / "one/run")
    met(home, folder, "term:1:4")
    run(command(home, folder, "local"), tmp_path / "again")
    found, expected = (
        torch.frombuffer(bytearray(toy.weights(folder)[-4096:]), dtype=torch.float32),
        torch.frombuffer(bytearray(whole[-4096:]), dtype=torch.float32),
    )
    assert float((found - expected).abs().max()) < 1e-5
    for engine in ("zero2", "fsdp2"):
        folder = home.begun(tmp_path / engine / "run")
        met(home, folder, "term:1:4", engine)
        ended = start(command(home, folder, engine, "toy: {steps: 6}", "training.processes=1"), tmp_path / "refused")
        assert ended.wait() == [2], ended.errors()
        checkpoints = next(folder.glob("passes/.work-*/checkpoints"))
        assert lines(ended) == [
            f"error: {checkpoints}/step-00000004: written with {engine} on 2 processes, this is {engine} on 1 "
            f"processes; start as before, or remove {checkpoints} to begin this pass again"
        ]


def torchrun(*arguments: str, fault: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "--shutdown-timeout", "5", "-m", "tests.training.toy", *arguments],
        env={**os.environ, toy.FAULT: fault}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_under_torchrun_a_hung_process_is_named_and_none_is_left(home: Home, tmp_path: Path) -> None:
    folder = home.begun(tmp_path / "here/run")
    launcher = torchrun(*command(home, folder, "ddp", "toy: {steps: 6}", "training.timeout=10"), fault="stop:1:4")
    _, said = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert errors == [f"error: process 1 (last: step 4) of 2 has not moved for 10 s (training.timeout); {AGAIN}"]
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)


def test_sigterm_to_torchrun_saves_in_every_process(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    launcher = torchrun(*command(home, folder, "ddp", "toy: {steps: 6}"), fault="slow:0:4")
    end = time.monotonic() + 120
    while "step-00000003" not in steps(folder) and time.monotonic() < end:
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)
    assert "step-00000003" in steps(folder)
    assert resumed(home, folder) == whole


def launched(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ARGUMENTS`, without a configuration of this machine's user."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_accelerate_launch_on_a_cpu_starts_one_process_and_is_refused(home: Home, tmp_path: Path) -> None:
    arguments = command(home, home.begun(tmp_path / "here/run"))
    done = launched("--cpu", "--num_processes", "2", "-m", "tests.training.toy", *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: training.engine: ddp given, but only one process runs (WORLD_SIZE is unset or 1; "
        "`accelerate launch --cpu` starts one whatever it is told); start with "
        "torchrun --nproc-per-node 2 -m flcompress apply RECIPE, or set training.processes: 1 if one is meant"
    ]


def test_accelerate_launch_of_two_processes(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    options = "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()), "-m"
    done = launched(*options, "tests.training.toy", *command(home, folder))
    assert done.returncode == 0, done.stderr
    assert toy.weights(folder) == whole


def test_accelerate_launch_with_a_configuration_for_deepspeed(home: Home, tmp_path: Path) -> None:
    """The stage it names is run; another engine is refused, once."""
    configuration = tmp_path / "accelerate.yaml"
    configuration.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        "deepspeed_config: {zero_stage: 2, gradient_accumulation_steps: 1}\nmixed_precision: 'no'\nmachine_rank: 0\n",
        encoding="utf-8",
    )
    options = "--config_file", configuration, "--main_process_port", str(free_port()), "-m", "tests.training.toy"
    folder = home.begun(tmp_path / "here/run")
    done = launched(*options, *command(home, folder, "zero2"))
    assert done.returncode == 0, done.stderr
    assert toy.weights(folder)
    refused = launched(*options, *command(home, home.begun(tmp_path / "there/run"), "zero3"))
    assert [line for line in refused.stderr.splitlines() if line.startswith("error:")] == [
        "error: training.engine: zero3 given, but accelerate was configured for ZeRO stage 2 "
        "(ACCELERATE_DEEPSPEED_ZERO_STAGE); set one like the other"
    ]
