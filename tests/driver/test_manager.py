from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.core.program import Program
from flcompress.core.steps import PassContext
from flcompress.driver.clips import Clips
from flcompress.driver.manager import apply, export
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.store import ENTRY_FILE
from flcompress.errors import (
    FlcompressError,
    ModelError,
    PostconditionError,
    RecordError,
    RequestError,
    TrainingError,
    UnavailableError,
)
from flcompress.files import locked
from flcompress.models import tensor_memory
from flcompress.planning.plan import plan_recipe
from flcompress.progress import QuietDisplay
from flcompress.reporting.reading import read_run
from tests.fixtures.fakes import CALLS, Reader
from tests.fixtures.recipes import WriteRecipe

STEPS = "passes:\n  - score: {draws: 2}\n  - cut: {keep: 0.5}\nexports: [text, copy]\n"


class Lines(QuietDisplay):
    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)


def run_recipe(path: Path, run: Path, *overrides: str) -> tuple[RunDirectory, list[str]]:
    display = Lines()
    return apply(path, run, overrides=overrides, display=display, device="cpu"), display.said


def test_clips_are_encoded_before_a_pass_begins_and_each_leaves_the_gpu_empty(
    write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text encoder beside a transformer would not fit."""
    render, read = Clips._render, Reader.apply

    def rendering(self: Clips, *given: Any) -> None:
        CALLS.append("encode")
        render(self, *given)

    def reading(self: Reader, program: Program, work: PassContext) -> Program:
        CALLS.append("begin")
        return read(self, program, work)

    monkeypatch.setattr(Clips, "_render", rendering)
    monkeypatch.setattr(Reader, "apply", reading)
    monkeypatch.setattr(tensor_memory, "free_gpu_memory", lambda: CALLS.append("free"))
    run_recipe(write("data: {moving-digits: {clips: 8}}\npasses: [reader, score]\n"), tmp_path / "run")
    assert CALLS == ["encode", "free", "begin", "reader 8", "free", "score 8", "free"]


def test_a_run_and_what_it_leaves(write: WriteRecipe, tmp_path: Path, model: Path) -> None:
    run, _ = run_recipe(write(STEPS), tmp_path / "run")
    assert CALLS == ["score 2", "cut 0.5", "text hello", "copy hello"]
    score, cut = run.entries()
    assert (score.name, score.index, score.result(), score.metrics()) == ("score", 1, {"draws": 2}, [{"step": 1}])
    assert score.folder.name == f"01-score-{score.key[:12]}"
    assert not (score.folder / "checkpoints").exists()
    assert {"entry.json", "program.json", "graph.json", "graph.txt"} <= {path.name for path in cut.folder.iterdir()}
    assert cut.record.arguments == {"keep": 0.5, "steps": 4}
    final = run.final()
    assert final.components["transformer"] == cut.folder / "transformer"
    assert final.components["original"] == model / "transformer"
    assert run.start().components["elastic"] == model / "transformer"
    assert run.start().contract.evaluations == 100
    assert final.facts == {"trained", "scored", "pruned"}
    assert (run.path / "exports" / "copy" / "copy.txt").read_text() == "hello"
    assert json.loads((run.path / "exports" / "text.json").read_text())["characters"] == 5
    assert [(event.event, event.name) for event in run.journal()] == [
        ("start", "tiny"), ("begin", "score"), ("pass", "score"), ("begin", "cut"), ("pass", "cut"), ("export", "text"),
        ("export", "copy"), ("done", "tiny"),
    ]  # fmt: skip
    assert run.journal()[0].threads == torch.get_num_threads()
    assert run.recipe().passes[1].name == "cut"
    assert not list((run.path / "passes").glob(".work-*"))


def test_a_second_apply_does_no_work_and_says_so(write: WriteRecipe, tmp_path: Path) -> None:
    path = write(STEPS)
    run_recipe(path, tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "passes").rglob("*")}
    CALLS.clear()
    run, said = run_recipe(path, tmp_path / "run")
    assert CALLS == []
    assert said[-1] == f"nothing to do: every pass and export is unchanged in {run.path}"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "passes").rglob("*")} == before
    assert {event.status for event in run.journal()[-5:]} == {"cached"}


def test_changing_the_last_pass_reruns_only_it(write: WriteRecipe, tmp_path: Path) -> None:
    path = write(STEPS)
    run_recipe(path, tmp_path / "run")
    CALLS.clear()
    run, _ = run_recipe(path, tmp_path / "run", "passes.cut.keep=0.25")
    assert CALLS == ["cut 0.25"]  # its fake result is the same, so the exports are too
    assert run.entries()[1].record.arguments["keep"] == 0.25
    CALLS.clear()
    run, _ = run_recipe(path, tmp_path / "run")
    assert CALLS == []
    assert run.entries()[1].record.arguments["keep"] == 0.5


@pytest.mark.parametrize("override", ["passes.score.draws=3", "seed=1"])
def test_a_change_upstream_reruns_what_depends_on_it(write: WriteRecipe, tmp_path: Path, override: str) -> None:
    path = write("passes: [score, {cut: {keep: 0.5}}]\n")
    run_recipe(path, tmp_path / "run")
    CALLS.clear()
    run_recipe(path, tmp_path / "run", override)
    assert CALLS[0].startswith("score")


def test_keys_are_compared_whole(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [score]\n")
    run, _ = run_recipe(path, tmp_path / "run")
    (entry,) = run.entries()
    record = {**entry.record.dump(), "key": entry.key[:12] + "0" * 52}
    (entry.folder / ENTRY_FILE).write_text(json.dumps(record))
    CALLS.clear()
    run, _ = run_recipe(path, tmp_path / "run")
    assert CALLS == ["score 8"]
    assert run.entries()[0].folder.name == f"01-score-{entry.key}"


def test_a_shared_store(write: WriteRecipe, tmp_path: Path) -> None:
    path = write(STEPS)
    store = tmp_path / "store"
    first = apply(path, tmp_path / "a", store=store, display=QuietDisplay(), device="cpu")
    CALLS.clear()
    second = apply(path, tmp_path / "b", store=store, display=QuietDisplay(), device="cpu")
    assert CALLS == ["text hello", "copy hello"]
    assert [entry.folder for entry in first.entries()] == [entry.folder for entry in second.entries()]
    assert second.entries()[0].folder.parent == store / "passes"


def test_a_model_that_moved_is_found_again(write: WriteRecipe, tmp_path: Path, model: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(model, here)
    run_recipe(write("passes: [score]\n"), tmp_path / "run", f"model.path={here}")
    here.rename(there)
    CALLS.clear()
    run, _ = run_recipe(write("passes: [score]\n"), tmp_path / "run", f"model.path={there}")
    assert CALLS == []
    assert run.final().components["vae"] == there / "vae"
    assert run.start().components["original"] == there / "transformer"


def test_a_run_that_moved_finds_its_model(write: WriteRecipe, tmp_path: Path, model: Path) -> None:
    run_recipe(write("passes: [score]\nexports: [text]\n"), tmp_path / "run")
    (tmp_path / "other" / "disk").mkdir(parents=True)
    (tmp_path / "run").rename(tmp_path / "other" / "disk" / "run")
    moved = RunDirectory(tmp_path / "other" / "disk" / "run")
    assert moved.final().components["vae"] == model / "vae"
    assert moved.start().components["original"] == model / "transformer"
    assert export(moved, force=True, display=QuietDisplay())["text"]["status"] == "ran"


def test_a_model_that_moved_is_asked_for(write: WriteRecipe, tmp_path: Path, model: Path) -> None:
    """Commands that read a finished run name what is missing, and take its new place if it is the same model."""
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    shutil.copytree(model, here)
    run_recipe(write("passes: [score, {cut: {keep: 0.5}}]\n"), tmp_path / "run", f"model.path={here}")
    here.rename(there)
    with pytest.raises(RequestError) as caught:
        RunDirectory(tmp_path / "run").final()
    assert str(caught.value).startswith(f"{here}/")
    assert "--model" in str(caught.value)
    found = RunDirectory(tmp_path / "run", there).final()
    assert found.components["vae"] == there / "vae"
    assert found.components["original"] == there / "transformer"
    assert found.components["transformer"].is_relative_to(tmp_path / "run")
    shutil.copytree(there, other)
    (other / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(RequestError, match="is not the model that"):
        RunDirectory(tmp_path / "run", other).final()
    with pytest.raises(RequestError, match="no such folder"):
        RunDirectory(tmp_path / "run", tmp_path / "nowhere").start()


def test_a_store_that_moved_is_named(write: WriteRecipe, tmp_path: Path) -> None:
    run = apply(write("passes: [score]\n"), tmp_path / "run", store=tmp_path / "store", display=QuietDisplay())
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for read in (run.start, run.final, run.entries, partial(read_run, run.path)):
        with pytest.raises(RequestError) as caught:
            read()
        assert str(caught.value).startswith(f"{tmp_path}/store/passes/00-model-")
        assert "--store" in str(caught.value)


@pytest.mark.e2e
def test_a_killed_run_goes_on(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes:\n  - score\n  - slow: {steps: 60}\n")
    run = tmp_path / "run"
    code = (
        "import sys; from tests.fixtures.fakes import installed; from flcompress.cli import main\n"
        f"with installed(): main(['apply', {str(path)!r}, '--run-dir', {str(run)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (logs := list(run.glob("passes/.work-02-slow-*/steps.txt"))) or len(logs[0].read_text()) < 10:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not RunDirectory(run).finished
    assert [entry.name for entry in RunDirectory(run).entries()] == ["score"]
    with pytest.raises(RequestError, match=r"not finished \(1 passes done\)"):
        RunDirectory(run).final()
    done = len(logs[0].read_text().splitlines())
    assert done < 60
    again, _ = run_recipe(path, run)
    assert CALLS == []
    log = (again.entries()[1].folder / "steps.txt").read_text()
    assert log == "".join(f"{step}\n" for step in range(60))


def test_two_at_once_do_not_fight(write: WriteRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_recipe(write("passes: [score]\n"), run)
    with locked(run, wait=False), pytest.raises(RequestError, match="another flcompress is working in this run"):
        run_recipe(write("passes: [score]\n"), run)


def test_a_full_disk_leaves_what_was_there(write: WriteRecipe, tmp_path: Path) -> None:
    run_recipe(write("passes: [score]\n"), tmp_path / "run")
    stored = {file: file.read_bytes() for file in (tmp_path / "run" / "passes").rglob("*.json")}
    with pytest.raises(FlcompressError) as caught:
        run_recipe(write("passes: [score, {broken: {how: full disk}}]\n"), tmp_path / "run")
    assert caught.value.exit_status == 1
    assert str(caught.value) == (
        f"{tmp_path}/run: no space left on the disk; what was stored before is kept: "
        "free some space and give the same command again"
    )
    assert {file: file.read_bytes() for file in stored} == stored


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("training", TrainingError, "broken: the loss is nan at update 3"),
        ("graph", PostconditionError, "broken: the kept-block map and the graph disagree on blocks.3"),
        ("component", PostconditionError, "broken: component vae should be in .*nowhere, but nothing is there"),
    ],
)
def test_what_fails_is_noted_and_not_stored(
    write: WriteRecipe, tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_recipe(write(f"passes: [score, {{broken: {{how: {how}}}}}]\n"), tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert [entry.name for entry in run.entries()] == ["score"]
    assert run.journal()[-1].event == "failed"
    assert run.journal()[-1].name == "broken"


def test_a_failed_export_keeps_the_old_one(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("exports: [text]\n")
    run_recipe(path, tmp_path / "run")
    with pytest.raises(TrainingError):
        run_recipe(path, tmp_path / "run", "exports.text.words=fail")
    assert (tmp_path / "run" / "exports" / "text" / "text.txt").read_text() == "hello"
    CALLS.clear()
    run_recipe(path, tmp_path / "run")
    assert CALLS == []


def test_exporting_again(write: WriteRecipe, tmp_path: Path) -> None:
    run, _ = run_recipe(write("passes: [score]\nexports: [{text: {words: a}}]\n"), tmp_path / "run")
    CALLS.clear()
    assert export(run, display=QuietDisplay())["text"]["status"] == "cached"
    assert export(run, ["text"], force=True, display=QuietDisplay())["text"]["status"] == "ran"
    assert export(run, ["copy"], display=QuietDisplay())["copy"]["status"] == "ran"
    assert CALLS == ["text a", "copy a"]


Command = Callable[[Path, Path], object]


def apply_quietly(recipe: Path, run_dir: Path) -> None:
    apply(recipe, run_dir, display=QuietDisplay())


REFUSED = [
    ("exports: [unavailable]\n", UnavailableError, r"pip install flcompress\[builder\]"),
    ("model: none\n", ModelError, r"model: no folder"),
]


@pytest.mark.parametrize("command", [apply_quietly, plan_recipe])
@pytest.mark.parametrize(("steps", "error", "message"), REFUSED)
def test_refused_before_anything_is_written(
    write: WriteRecipe, tmp_path: Path, model: Path, steps: str, error: type[Exception], message: str, command: Command
) -> None:
    path = write(steps)
    if steps.startswith("model"):
        path.write_text("version: 1\nmodel: none\n")
    with pytest.raises(error, match=message):
        command(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [apply_quietly, plan_recipe])
def test_a_run_directory_of_another_recipe(write: WriteRecipe, tmp_path: Path, command: Command) -> None:
    run_recipe(write("passes: [score]\n"), tmp_path / "run")
    with pytest.raises(RequestError) as caught:
        command(write("passes: [score]\n", "other"), tmp_path / "run")
    assert str(caught.value) == (
        f"{tmp_path}/run: run directory of recipe 'tiny', not of 'other'; choose another --run-dir"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    with pytest.raises(RequestError, match=r"not empty and no run directory \(no run\.json\)"):
        command(write(""), tmp_path / "full")


def test_no_run_directory(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        RunDirectory(tmp_path).entries()
    assert str(caught.value) == (
        f"{tmp_path}: not a run directory (no run.json); give the folder that flcompress apply wrote"
    )


def test_random_weights_are_drawn_from_the_seed(write: WriteRecipe, tmp_path: Path, model: Path) -> None:
    path = write("passes: [score]\n")
    run, _ = run_recipe(path, tmp_path / "run", "model.weights=random")
    start = run.start()
    assert start.facts == frozenset()
    assert start.components["transformer"].is_relative_to(run.path / "passes")
    first = start.digest
    other, _ = run_recipe(path, tmp_path / "run", "model.weights=random", "seed=1")
    assert other.start().digest != first


def test_a_damaged_journal_is_reported(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"event": "begin", "threads": 3}\n{"event": "pa')
    assert [event.event for event in RunDirectory(tmp_path).journal()] == ["begin"]
    assert RunDirectory(tmp_path).threads == 3
    journal.write_text('{"event": "pa\n{"event": "begin", "threads": 3}\n')
    with pytest.raises(RecordError, match=r"journal\.jsonl: line 1 is not JSON .*; remove that line$"):
        RunDirectory(tmp_path).journal()
