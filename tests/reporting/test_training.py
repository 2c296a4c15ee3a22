"""Trainings in the report: while they run, after they were stopped, with what went wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from flcompress.core.settings import highest
from flcompress.files import Lock, append_line, locked
from flcompress.reporting.html import write_report
from flcompress.reporting.reading import read_run
from flcompress.reporting.terminal import print_summary
from flcompress.reporting.training import MOST_STRIPS, trainings
from tests.reporting.synthetic import write_run

LIMITS = {"critic_lag": {"setting": "max_critic_lag", "low": None, "high": 1.0, "mend": "raise critic_updates"}}
DISTANCES = {0: 0.5, 10: 0.2, 20: 0.1, 30: 0.3}


def begun(path: Path, *, action: str = "warn") -> Path:
    """A run whose dmd pass is at step 34 of 200; returns the folder it works in."""
    run = write_run(path, passes=False, measured=False)
    folder = run / "passes" / ".work-01-dmd-0123456789ab"
    (folder / "samples").mkdir(parents=True)
    lines: list[dict[str, float]] = []
    for step in range(35):
        if step:
            lines.append({"step": step, "generator_loss": 0.5 / step, "normaliser_min": 0.1, "normaliser_max": 0.9})
        if step in DISTANCES:
            lag = 2.5 if step == 30 else 0.25
            lines.append({"step": step, "sample_distance": DISTANCES[step], "critic_lag": lag})
            Image.new("RGB", (60, 40), (step, 0, 0)).save(folder / "samples" / f"step-{step:08d}.png")
    Image.new("RGB", (60, 40)).save(folder / "samples" / "teacher.png")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 35, "gen')
    health = {"held_out": "sample_distance", "limits": LIMITS, "max_worsening": 1.0, "max_grad_norm": None}
    (folder / "health.json").write_text(json.dumps(health))
    breach = {"step": 30, "figure": "critic_lag", "value": 2.5, **LIMITS["critic_lag"], "action": action,
              "best_step": 20}  # fmt: skip
    (folder / "breaches.jsonl").write_text(json.dumps(breach) + "\n")
    event: dict[str, Any] = {"event": "begin", "name": "dmd", "key": "0" * 64, "arguments": {"steps": 200}}
    append_line(run / "journal.jsonl", json.dumps({**event, "folder": "passes/.work-01-dmd-0123456789ab"}))
    return folder


def test_a_running_training_is_shown(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    with locked(folder, wait=False) as lock:
        assert lock is Lock.HELD
        (found,) = trainings(read_run(tmp_path))
        assert (found.status, found.step, found.steps, found.best_step) == ("running", 34, 200, 20)
        page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="status running">running</span> step 34 of 200; best evaluation: step 20.' in page
    assert "<strong>Step 30: critic lag 2.50</strong>, expected at most 1.00" in page
    assert "Sample distance, at most 0.2" in page
    assert '<td class="n worse">2.50</td><td>at most 1.00</td>' in page
    assert page.count("data:image/png;base64,") == 1 + len(DISTANCES)
    assert "step 20, best evaluation" in page


def test_figures_are_shown_with_their_range_on_other_draws(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    lines = [
        {"step": step, "draws": [{"sample_distance": value * share} for share in (0.5, 1.5, 3.0 if step == 20 else 1)],
         "reference": [{"sample_distance": 0.01}, {"sample_distance": 0.03}]}
        for step, value in DISTANCES.items()
    ]  # fmt: skip
    (folder / "redraws.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    breaches = folder / "breaches.jsonl"
    breaches.write_text(breaches.read_text().replace('"value": 2.5', '"value": 2.5, "redrawn": [1.5, null, 3.5]'))
    (found,) = trainings(read_run(tmp_path))
    figure = next(one for one in found.figures if one.decides)
    assert found.best_step == 20  # mean of four draws 0.15; 0.2 at step 10
    assert [round(one or 0.0, 9) for one in figure.redraw_range] == [0.15, 0.45]
    assert figure.bounds[1] == pytest.approx(highest(0.1, 1.0, 0.02))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<strong>Step 30: critic lag 2.50</strong> (1.50 to 3.50 on other draws), expected at most 1.00" in page
    assert "0.300 (0.150 to 0.450)" in page


def test_a_stopped_training_says_how_to_go_on(tmp_path: Path) -> None:
    begun(tmp_path, action="stop")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="status stopped">stopped</span> step 34 of 200' in page
    assert "The training was stopped." in page
    assert "it resumes from the last checkpoint" in page


def test_the_terminal_tells_status_figures_and_breaches(tmp_path: Path) -> None:
    begun(tmp_path)
    console = Console(width=140, record=True, file=(tmp_path / "out").open("w"))
    print_summary(tmp_path, console)
    console.file.close()
    text = console.export_text()
    assert "34 of 200  sample distance  0.500  0.100 at 20   0.300" in text
    assert "warn: dmd: step 30: critic lag 2.50, expected at most 1.00" in text


def test_a_rollback_names_the_look_it_went_back_to(tmp_path: Path) -> None:
    folder = begun(tmp_path, action="rollback")
    file = folder / "breaches.jsonl"
    file.write_text(file.read_text().replace('"best_step": 20', '"best_step": 10'))
    (found,) = trainings(read_run(tmp_path))
    assert found.best_step == 10
    assert (
        "The pass went back to step 10, its best held-out evaluation, and ended there."
        in write_report(tmp_path).read_text()
    )


def test_a_pass_that_is_stored_is_no_longer_under_way(tmp_path: Path) -> None:
    begun(tmp_path)
    append_line(tmp_path / "journal.jsonl", json.dumps({"event": "pass", "name": "dmd", "key": "0" * 64}))
    assert trainings(read_run(tmp_path)) == []


def test_a_folder_that_has_just_been_renamed_is_no_error(tmp_path: Path) -> None:
    begun(tmp_path).rename(tmp_path / "passes" / "moved")
    assert read_run(tmp_path).unfinished is None


def test_of_many_looks_the_first_and_the_last_are_shown(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    for step in range(40, 400, 10):
        Image.new("RGB", (4, 4)).save(folder / "samples" / f"step-{step:08d}.png")
    labels = [label for label, _ in trainings(read_run(tmp_path))[0].strips]
    assert len(labels) == 1 + MOST_STRIPS
    assert (labels[0], labels[1], labels[-1]) == ("teacher", "step 0", "step 390")


@pytest.mark.parametrize("missing", ["health.json", "breaches.jsonl", "samples"])
def test_a_training_without_one_of_its_files_is_shown_all_the_same(missing: str, tmp_path: Path) -> None:
    folder = begun(tmp_path)
    (folder / missing).rename(tmp_path / "gone")
    assert "Generator loss" in write_report(tmp_path).read_text(encoding="utf-8")


def test_drawn_samples_are_plotted_next_to_the_teachers(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    for step, flow in ((None, 2.0), (0, 1.0), (10, 1.2), (10, 1.5)):
        append_line(folder / "drawn.jsonl", json.dumps({"step": step, "flow": flow, "saturation": 0.3}))
    panels = {panel.title: panel.lines for panel in trainings(read_run(tmp_path))[0].panels}
    assert panels["Samples: motion, pixels at 256"] == {
        "student": [(0.0, 1.0), (10.0, 1.5)],
        "teacher": [(0.0, 2.0), (10.0, 2.0)],
    }
    assert "Samples: saturation" in panels
    assert "Samples: diversity of prompts" not in panels
    assert "Samples: motion, pixels at 256" in write_report(tmp_path).read_text(encoding="utf-8")
