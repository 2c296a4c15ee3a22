"""A full disk, a folder that may not be written, a damaged shard, and two runs in one folder."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.fixtures.small_disk import small_disk
from tests.training import toy
from tests.training.faulty import command, lines, met, resumed, steps
from tests.training.home import Home
from tests.training.processes import PATIENCE, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_disk_that_fills_up(home: Home, tmp_path: Path, engine: str) -> None:
    """While the checkpoint of step 4 is written, by process 0 alone or by both."""
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = home.begun(disk / "run")
        ended = met(home, folder, "full:1:4", engine)
        said = lines(ended)
        assert [process.exitcode for process in ended.processes] == [1, 1], said
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
        assert line == f"error: {folder}: Read-only file system; make it writable, or choose another place"


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


def test_two_runs_in_one_directory(home: Home, tmp_path: Path) -> None:
    folder = home.begun(tmp_path / "here/run")
    slow = "toy: {steps: 6}"
    first = start(
        command(home, folder, "ddp", slow), tmp_path / "one", processes=2, environment={toy.FAULT: "stop:0:4"}
    )
    end = time.monotonic() + PATIENCE
    while not steps(folder) and time.monotonic() < end:
        time.sleep(0.1)
    second = start(command(home, folder), tmp_path / "two", processes=2)
    assert second.wait() == [2, 2]
    first.kill()
    assert lines(second) == [
        f"error: {folder}: another flcompress is working in this run directory; wait for it or choose another --run-dir"
    ]
