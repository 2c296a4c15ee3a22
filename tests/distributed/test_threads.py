"""Threads by free cores, the same for every attempt at a run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from flcompress.distributed.launch import free_cores, use_free_cores
from flcompress.driver.rundir import JOURNAL_FILE, RunDirectory


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eight cores of which this process may use six; torch would take four threads."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4, 5}, raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("used", "free", "threads"),
    [
        ([2.0] * 8, 6, 4),  # a quiet machine: as many as without us
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 100.0, 100.0], 6, 4),  # others' cores are theirs
        ([100.0, 100.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0], 3, 3),
        ([100.0] * 8, 1, 1),
    ],
)
def test_as_many_as_there_are_free_cores(
    used: list[float], free: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: used)
    assert free_cores() == free
    assert use_free_cores() == threads == torch.get_num_threads()


def test_an_earlier_attempt_and_the_environment_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100.0] * 8)
    assert use_free_cores(earlier=3) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert use_free_cores(earlier=2) == 3


def test_a_run_keeps_its_number_until_it_is_done(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.threads is None
    for events, threads in (
        ([{"event": "start", "threads": 2}, {"event": "begin"}], 2),
        ([{"event": "start"}, {"event": "begin"}], None),  # of an older version
        ([{"event": "start", "threads": 2}, {"event": "done"}], None),
    ):
        (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
        assert run.threads == threads
