"""What a pass took against its plan: in the journal, on the terminal while it runs, and in the report."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from flcompress.core import attempts
from flcompress.core.program import Program
from flcompress.core.records import PlannedFigures
from flcompress.core.steps import PassContext
from flcompress.driver import figures
from flcompress.driver.clips import Clips
from flcompress.driver.figures import showing_speed
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.frontend.recipe import Recipe
from flcompress.progress import QuietDisplay, _few
from flcompress.reporting.html import write_report
from flcompress.reporting.reading import read_run
from flcompress.reporting.stages import steps
from flcompress.reporting.terminal import print_summary
from flcompress.wording import size
from tests.fixtures import fakes
from tests.fixtures.recipes import WriteRecipe

pytestmark = pytest.mark.usefixtures("fake_steps")

ON_GPU = PlannedFigures(
    machine="H100 80 GB", gpu=True, processes=2, memory=40e9, seconds=50.0, forwards=3000, flops=1e15, peak_flops=1e14
)
"""Of a pass of 10 steps of 2 clips."""
ON_CPU = ON_GPU.model_copy(update={"machine": "process", "gpu": False, "memory": 5e8, "peak_flops": None})

Planned = PlannedFigures | None


class Lines(QuietDisplay):
    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cut` trains four of its ten steps in 20 s of a clock of its own."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=lambda: clock.now))
    plain = fakes.Cut.apply

    def do(self: fakes.Cut, program: Program, context: PassContext) -> Program:
        clock.now += 20.0
        lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 5))
        (context.directory / "metrics.jsonl").write_text(lines, encoding="utf-8")
        return plain(self, program, context)

    monkeypatch.setattr(fakes.Cut, "apply", do)


def applied(
    write: WriteRecipe, folder: Path, planned: Planned, given: Callable[[Sequence[Planned]], Sequence[Planned]] = list
) -> tuple[RunDirectory, list[str]]:
    """A run of `score` and `cut`, of which the latter has a plan, and what it said."""
    display, asked = Lines(), list[tuple[str, int]]()

    def planner(recipe: Recipe, device: str, processes: int) -> Sequence[Planned]:
        asked.append((device, processes))
        return given([None, planned])

    path = write("passes: [score, {cut: {keep: 0.5}}]\n")
    run = apply(path, folder, display=display, device="cpu", planner=planner)
    apply(path, folder, display=display, device="cpu", planner=planner)
    assert asked == [("cpu", 1)], "planned once, and not where nothing runs"
    return run, display.said


@pytest.mark.usefixtures("trains")
def test_utilisation_is_of_the_steps_that_were_trained(write: WriteRecipe, tmp_path: Path) -> None:
    """Four tenths of 10^15 FLOPs in 20 s at 10^14 FLOP/s; and 8 clips."""
    run, _ = applied(write, tmp_path / "run", ON_GPU)
    events = run.journal()
    begun, done = (next(one for one in events if (one.event, one.name) == (kind, "cut")) for kind in ("begin", "pass"))
    assert begun.planned == ON_GPU
    assert (done.clips_per_second, done.utilisation) == (0.4, 0.2)
    assert [one.planned for one in events if one.event == "begin" and one.name == "score"] == [None]
    first, second = (steps(read_run(run.path))[n] for n in (0, 1))
    assert (first.planned, second.planned) == (None, ON_GPU), "of a pass that was cached in the latest attempt, too"


@pytest.mark.usefixtures("trains")
def test_no_utilisation_without_one_size_or_a_known_gpu(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = applied(write, tmp_path / "cpu", ON_CPU)
    monkeypatch.setattr(Clips, "one_size", False)
    several, _ = applied(write, tmp_path / "several", ON_GPU)
    for each in (run, several):
        (done,) = [one for one in each.journal() if (one.event, one.name, one.status) == ("pass", "cut", "ran")]
        assert (done.clips_per_second, done.utilisation) == (0.4, None)


def test_a_plan_that_fails_is_reported_and_the_run_continues(write: WriteRecipe, tmp_path: Path) -> None:
    def fail(given: Sequence[Planned]) -> Sequence[Planned]:
        raise RequestError("cannot be traced\nby anyone")

    run, said = applied(write, tmp_path / "run", ON_GPU, fail)
    assert run.finished
    assert "warning: no plan to compare this run with, it continues: RequestError: cannot be traced" in said
    assert all(one.planned is None for one in run.journal())


@pytest.mark.usefixtures("trains")
def test_the_report_shows_the_plan_next_to_what_was_measured(write: WriteRecipe, tmp_path: Path) -> None:
    run, _ = applied(write, tmp_path / "run", ON_CPU)
    peak = run.entries()[1].record.peak_rss_mb
    assert peak is not None
    out = io.StringIO()
    print_summary(run.path, Console(file=out, width=160, color_system=None))
    table = out.getvalue().partition("Planned and measured")[2].splitlines()
    assert " ".join(table[2].split()) == "pass on planned memory measured ratio planned time measured ratio"
    (row,) = [line for line in table if line.split()[:1] == ["cut"]]
    assert " ".join(row.split()) == f"cut CPU 500 MB {size(peak * 1e6)} {peak / 500:.2f}x 50.0 s 20.0 s 0.40x"
    page = write_report(run.path).read_text(encoding="utf-8")
    assert '<td>CPU</td><td class="n">500 MB</td>' in page
    assert f'<td class="n">{peak / 500:.2f}x</td><td class="n">50.0 s</td><td class="n">20.0 s</td>' in page


@pytest.mark.usefixtures("trains")
def test_what_was_not_measured_is_not_shown(write: WriteRecipe, tmp_path: Path) -> None:
    """The memory of a GPU that this process did not use, and the time on a GPU of unknown speed."""
    run, _ = applied(write, tmp_path / "run", ON_GPU.model_copy(update={"seconds": None}))
    assert steps(read_run(run.path))[1].against_plan() == ["GPU", "40 GB", "", "", "", "20.0 s", ""]
    assert ">on<" not in write_report(applied(write, tmp_path / "no-plan", None)[0].path).read_text().lower()


def test_the_speed_is_shown_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of this attempt's first step: of a resumed pass, the seventh. Other progress stays as it is."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(figures, "time", SimpleNamespace(monotonic=lambda: clock.now))
    shown: list[Mapping[str, float]] = []
    step = fakes.Cut(keep=0.5)
    sink = showing_speed(lambda done, total, values: shown.append(values), step, ON_GPU, lambda: True)
    for done, seconds in ((7, 100.0), (8, 4.0), (9, 4.0)):
        clock.now += seconds
        sink(done, 10, {"loss": 0.5})
    sink(2, 3, {"other": 1.0})
    assert shown == [
        {"loss": 0.5},
        *[{"loss": 0.5, "clips_per_second": 0.5, "utilisation": 0.25}] * 2,
        {"other": 1.0},
    ]
    assert _few(shown[1]) == ["loss 0.5", "clips per second 0.5", "utilisation 0.25"]
