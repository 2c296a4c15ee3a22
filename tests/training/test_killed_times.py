"""A training that was killed twice: what it took is in the journal, the stored record and the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flcompress.core import attempts
from flcompress.reporting.reading import read_run
from flcompress.reporting.stages import steps
from flcompress.reporting.training import trainings
from tests.training import toy
from tests.training.faulty import command
from tests.training.home import Home
from tests.training.processes import run, start

SECONDS = 0.4
"""That a step takes."""


def often() -> None:
    attempts.PERIOD_SECONDS = 0.05


@pytest.mark.slow
def test_a_training_killed_twice_has_the_time_of_all_attempts(home: Home, tmp_path: Path) -> None:
    """Killed at the beginning of steps 4 and 6: three steps, two, and the sixth."""
    folder = home.begun(tmp_path / "run")
    given = command(home, folder, "local", f"toy: {{steps: 6, seconds: {SECONDS}}}")
    for step in (4, 6):
        killed = start(given, tmp_path / "output", hooks={0: often}, environment={toy.FAULT: f"exit:0:{step}"})
        assert killed.wait() == [7]
    (unfinished,) = trainings(read_run(folder))
    assert unfinished.status == "stopped"
    assert unfinished.entry.seconds > 5 * SECONDS - 0.3
    run(given, tmp_path / "output", hooks={0: often})
    (entry,) = folder.glob("passes/01-toy-*")
    record, events = json.loads((entry / "entry.json").read_text()), (folder / "journal.jsonl").read_text().split("\n")
    told = [one["seconds"] for one in json.loads((entry / "attempts.json").read_text())["attempts"]]
    assert [seconds > count * SECONDS - 0.15 for seconds, count in zip(told, (3, 2, 1), strict=True)] == [True] * 3
    assert record["seconds"] == pytest.approx(sum(told), abs=0.01)
    (event,) = [one for one in map(json.loads, filter(None, events)) if one["event"] == "pass"]
    (shown,) = steps(read_run(folder))
    assert (event["seconds"], shown.seconds, shown.attempts) == (record["seconds"], record["seconds"], 3)
