"""What a piece of work took is of all its attempts, killed ones too."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flcompress.core import attempts
from flcompress.core.attempts import attempt, describe, seconds_so_far
from flcompress.core.program import Program
from flcompress.core.records import Event
from flcompress.core.steps import Pass, PassContext
from flcompress.driver.manager import apply
from flcompress.progress import QuietDisplay
from flcompress.reporting.html import write_report
from flcompress.reporting.reading import read_run
from flcompress.reporting.stages import Step, steps
from flcompress.reporting.terminal import print_summary
from tests.fixtures import fakes
from tests.fixtures.recipes import WriteRecipe

pytestmark = pytest.mark.usefixtures("fake_steps")

KILLED = """
import os, signal, sys, time
from pathlib import Path
from flcompress.core import attempts
attempts.PERIOD_SECONDS = 0.02
file = Path(sys.argv[1])
before = attempts.seconds_so_far(file, "key")
with attempts.attempt(file, "key") as own:
    grown = bytearray(int(sys.argv[2]) * 1_000_000)
    until = time.monotonic() - own.began + 0.2
    while attempts.seconds_so_far(file, "key") < before + until:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""It dies once its record is 0.2 s younger than its memory is large."""


def killed(file: Path, megabytes: int) -> float:
    """Return the seconds from before its start to after its end."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", KILLED, str(file), str(megabytes)], check=False)
    assert done.returncode == -signal.SIGKILL
    return time.monotonic() - started


def test_killed_attempts_count(tmp_path: Path) -> None:
    """A record is written every 0.02 s, more rarely on a busy machine, and holds no more than what passed here."""
    file = tmp_path / "attempts.json"
    passed = [killed(file, megabytes) for megabytes in (300, 1)]
    before = json.loads(file.read_text())["attempts"]
    assert len(before) == 2
    assert all(0.2 <= attempt["seconds"] <= most for attempt, most in zip(before, passed, strict=True))
    assert before[0]["peak_rss_mb"] > before[1]["peak_rss_mb"] + 200
    with attempt(file, "key") as third:
        pass
    record = third.record()
    last = json.loads(file.read_text())["attempts"][2]
    assert record["seconds"] == pytest.approx(sum(one["seconds"] for one in [*before, last]), abs=2e-3)
    assert record["peak_rss_mb"] == max(one["peak_rss_mb"] for one in [*before, last])
    assert record["attempts"] == 3
    assert f" s in 3 attempts, peak {record['peak_rss_mb']:.0f} MB" in describe(record)


def test_attempts_at_something_else_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    file.write_text(json.dumps({"key": "other", "attempts": [{"seconds": 1e6, "peak_rss_mb": 1e6}]}))
    with attempt(file, "key") as first:
        pass
    assert first.record()["attempts"] == 1
    assert first.record()["seconds"] < 1e3


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "key"}', '{"key": "key", "attempts": [{}]}', "\x00\xff"])
def test_a_damaged_record_counts_for_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "attempts.json"
    file.write_bytes(text.encode("latin-1"))
    assert seconds_so_far(file, "key") == 0.0
    with attempt(file, "key") as first:
        pass
    assert first.record()["attempts"] == 1


def test_a_record_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with attempt(tmp_path / "gone" / "attempts.json", "key") as first:
        pass
    assert first.record()["attempts"] == 1


def test_time_after_the_end_is_not_counted(tmp_path: Path) -> None:
    with attempt(tmp_path / "attempts.json", "key") as first:
        pass
    record = first.record()
    time.sleep(0.05)
    assert first.record() == record


class Interrupted:
    """Work that takes a minute each time, by a clock that only it moves, and is interrupted twice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls, self.earlier = 100.0, 0, list[float]()
        monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: self.now))

    def work(self) -> None:
        self.calls += 1
        self.now += 60.0
        if self.calls < 3:
            raise KeyboardInterrupt

    def run(self, command: Callable[[], Any]) -> Any:
        """Give the command three times."""
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                command()
            self.now += 1e6  # between two commands
        return command()


class Lines(QuietDisplay):
    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


def test_a_pass_has_the_time_of_all_attempts(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is stored, the journal, the line on the terminal and the report."""
    slow, display = Interrupted(monkeypatch), Lines()

    def do(self: Pass, program: Program, work: PassContext) -> Program:
        slow.earlier.append(work.earlier_seconds)
        slow.work()
        return program

    monkeypatch.setattr(fakes.Slow, "apply", do)
    path = write("passes:\n  - slow: {steps: 1}\n")
    run = slow.run(lambda: apply(path, tmp_path / "run", display=display, device="cpu"))
    (entry,) = run.entries()
    assert slow.earlier == [0.0, 60.0, 120.0]
    assert (entry.record.seconds, entry.record.attempts) == (180.0, 3)
    noted = [event for event in run.journal() if event.event == "pass"][-1]
    assert (noted.seconds, noted.attempts, noted.peak_rss_mb) == (180.0, 3, entry.record.peak_rss_mb)
    assert any(line.startswith("1/1 slow: 180.0 s in 3 attempts, peak ") for line in display.said)
    (step,) = steps(read_run(run.path))
    assert (step.seconds, step.attempts) == (180.0, 3)
    assert "3 min 00 s in 3 attempts" in write_report(run.path).read_text(encoding="utf-8")
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    print_summary(run.path, console)
    console.file.close()
    assert "3 min 00 s in 3 attempts" in console.export_text()


def test_an_export_has_the_time_of_all_attempts(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, plain = Interrupted(monkeypatch), fakes.Text.export

    def export(self: fakes.Text, program: Program, folder: Path, *given: Any) -> dict[str, Any]:
        slow.work()
        return plain(self, program, folder, *given)

    monkeypatch.setattr(fakes.Text, "export", export)
    path = write("passes: [score]\nexports: [text]\n")
    run = slow.run(lambda: apply(path, tmp_path / "run", display=QuietDisplay(), device="cpu"))
    record = json.loads((run.exports / "text.json").read_text())
    assert (record["seconds"], record["attempts"]) == (180.0, 3)
    noted = [event for event in run.journal() if event.event == "export"][-1]
    assert (noted.seconds, noted.attempts) == (180.0, 3)
    assert sorted(path.name for path in run.exports.iterdir()) == ["text", "text.json"]
    again = write("passes: [score]\nexports: [{text: {words: other}}]\n")
    apply(again, tmp_path / "run", display=QuietDisplay(), device="cpu")
    assert json.loads((run.exports / "text.json").read_text())["attempts"] == 1


def test_a_result_of_an_earlier_version_is_read(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [score]\n")
    run = apply(path, tmp_path / "run", display=QuietDisplay(), device="cpu")
    (entry,) = run.entries()
    record = {key: value for key, value in entry.record.dump().items() if key != "attempts"}
    (entry.folder / "entry.json").write_text(json.dumps(record))
    apply(path, tmp_path / "run", display=QuietDisplay(), device="cpu")
    assert [step.attempts for step in steps(read_run(run.path))] == [1]


def test_the_memory_of_a_gpu_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the beginning of each attempt; without a GPU the record has no such keys."""
    import torch

    with attempt(tmp_path / "none.json", "key") as without:
        pass
    assert "peak_gpu_mb" not in without.record()
    resets: list[None] = []
    peaks = {"max_memory_allocated": lambda: 3.5e9, "max_memory_reserved": lambda: 4e9}
    told = {"is_available": lambda: True, "is_initialized": lambda: True}
    for name, value in {**peaks, **told, "reset_peak_memory_stats": lambda: resets.append(None)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    file = tmp_path / "attempts.json"
    file.write_text(json.dumps({"key": "key", "attempts": [{"seconds": 1.0, "peak_rss_mb": 1.0, "peak_gpu_mb": 5e3}]}))
    with attempt(file, "key") as second:
        pass
    record = second.record()
    assert (record["peak_gpu_mb"], record["peak_gpu_reserved_mb"], len(resets)) == (5e3, 4e3, 1)
    assert describe(record).endswith(", on the GPU 5000 MB")
    Event(event="pass", **record)
    step = Step(event="pass", name="dmd", status="ran", clips_per_second=3.25, **{**record, "seconds": 60.0})
    assert step.memory.endswith(", GPU 5 GB (4 GB reserved)")
    assert step.time.endswith(", 3.25 clips/s")
