"""On a disk that is really full, what was there stays whole, and one line says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flcompress.driver.rundir import RunDirectory
from tests.cli.test_cli import cli
from tests.fixtures.fakes import CALLS
from tests.fixtures.recipes import WriteRecipe
from tests.fixtures.small_disk import fill, small_disk
from tests.reporting.synthetic import write_run

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("fake_steps")]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 16) as folder:
        yield folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_report(disk: Path) -> None:
    run = write_run(disk / "run", passes=False, measured=False)
    assert cli("report", run).exit_code == 0
    before = contents(run)
    ballast = fill(disk)
    failed = cli("report", run)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr == (
        f"error: {run}: no space left on the disk; what was stored before is kept: "
        "free some space and give the same command again\n"
    )
    assert contents(run) == before
    ballast.unlink()
    assert cli("report", run).exit_code == 0


@pytest.mark.parametrize("leave", [0, 1 << 13, 1 << 14, 1 << 16])
def test_apply(write: WriteRecipe, disk: Path, leave: int) -> None:
    """Nothing can be written, or the run can be begun, or the pass can, but not its weights."""
    run = disk / "run"
    done = cli("apply", write("passes: [score]\n"), "--run-dir", run, "--quiet")
    assert done.exit_code == 0, done.output
    kept = contents(run / "passes")
    recipe = write("passes: [score, {cut: {keep: 0.5}}]\n")
    ballast = fill(disk, leave)
    failed = cli("apply", recipe, "--run-dir", run, "--quiet")
    assert failed.exit_code == 1, failed.output
    assert failed.stderr == (
        f"error: {run}: no space left on the disk; what was stored before is kept: "
        "free some space and give the same command again\n"
    )
    assert {file: text for file, text in contents(run / "passes").items() if file in kept} == kept
    assert all(event.event for event in RunDirectory(run).journal())
    assert not list(run.glob("*.tmp"))
    ballast.unlink()
    CALLS.clear()
    again = cli("apply", recipe, "--run-dir", run, "--quiet")
    assert again.exit_code == 0, again.output
    assert CALLS == ["cut 0.5"]
    assert [entry.name for entry in RunDirectory(run).entries()] == ["score", "cut"]
