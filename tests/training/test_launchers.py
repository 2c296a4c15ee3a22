"""The launchers that users start: torchrun and accelerate, their signals, their settings against the recipe's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training import toy
from tests.training.faulty import AGAIN, command, resumed, steps
from tests.training.home import Home
from tests.training.processes import PATIENCE, free_port

pytestmark = pytest.mark.slow


def torchrun(*arguments: str, fault: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
         "--shutdown-timeout", "5", "-m", "tests.training.toy", *arguments],
        env={**os.environ, toy.FAULT: fault}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_under_torchrun_a_hung_process_is_named_and_none_is_left(home: Home, tmp_path: Path) -> None:
    folder = home.begun(tmp_path / "here/run")
    launcher = torchrun(*command(home, folder, "ddp", "toy: {steps: 6}", "training.timeout=20"), fault="stop:1:4")
    _, said = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert errors == [f"error: process 1 (last: step 4) of 2 has not moved for 20 s (training.timeout); {AGAIN}"]
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)


def test_sigterm_to_torchrun_saves_in_every_process(home: Home, tmp_path: Path, whole: bytes) -> None:
    folder = home.begun(tmp_path / "here/run")
    launcher = torchrun(*command(home, folder, "ddp", "toy: {steps: 6}"), fault="slow:0:4")
    end = time.monotonic() + PATIENCE
    while "step-00000003" not in steps(folder) and time.monotonic() < end:
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=PATIENCE)
    with pytest.raises(ProcessLookupError):
        os.killpg(launcher.pid, 0)
    assert "step-00000003" in steps(folder)
    assert resumed(home, folder) == whole


def launched(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch ARGUMENTS`, without a configuration of this machine's user."""
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip


def test_accelerate_launch_on_a_cpu_starts_one_process_and_is_refused(home: Home, tmp_path: Path) -> None:
    arguments = command(home, home.begun(tmp_path / "here/run"))
    done = launched("--cpu", "--num_processes", "2", "-m", "tests.training.toy", *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert errors == [
        "error: training.engine: ddp given, but only one process runs (WORLD_SIZE is unset or 1; "
        "`accelerate launch --cpu` always starts one); start with "
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
