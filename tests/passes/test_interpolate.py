"""A student's weights, moved part of the way back to those that its training started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from flcompress.core.program import FEW_STEP_START, Fact
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import PreconditionError
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.e2e

CUT = {"prune": {"remove": 0.2, "by": "middle"}}
STUDENTS: dict[str, dict[str, Any]] = {
    "dmd": {"dmd": {"steps": 1, "batch": 2, "critic_updates": 1, "learning_rate": 1e-2}},
    "consistency": {"consistency": {"steps": 1, "batch": 2, "learning_rate": 1e-2}},
}


def recipe(folder: Path, passes: list[dict[str, Any]]) -> Path:
    path = folder / "recipe.yaml"
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 8}},
        "passes": passes,
        "training": {"health": {"samples": 0}, "log_to": []},
    }
    path.write_text(yaml.safe_dump(content))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    loaded: dict[str, torch.Tensor] = load_file(str(file))
    return loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_pipeline(tmp_path / "model")
    return tmp_path


def statuses(run: RunDirectory) -> dict[str, str]:
    """Of the last time that the recipe was applied."""
    events = [json.loads(line) for line in (run.path / "journal.jsonl").read_text().splitlines()]
    return {event["name"]: event["status"] for event in events if event["event"] == "pass"}


@pytest.mark.parametrize("kind", STUDENTS)
def test_the_result_lies_between_start_and_student(folder: Path, kind: str) -> None:
    passes = [CUT, STUDENTS[kind]]
    run = apply(recipe(folder, [*passes, {"interpolate": {"start_share": 0.25}}]), folder / "run")
    cut, student, result = (entry.program() for entry in run.entries())
    start, trained, between = (weights(program.components["transformer"]) for program in (cut, student, result))
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    for name, value in between.items():
        expected = 0.75 * trained[name].double() + 0.25 * start[name].double()
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-8)
    assert result.components[FEW_STEP_START] == cut.components["transformer"]
    assert (result.contract, result.kept, result.graph) == (student.contract, student.kept, student.graph)
    assert Fact.FEW_STEP in result.facts
    loaded = WanTransformer3DModel.from_pretrained(str(result.components["transformer"]))
    assert all(torch.equal(value, between[name]) for name, value in loaded.state_dict().items())


def test_another_share_repeats_no_training(folder: Path) -> None:
    for share in (0.25, 0.5):
        run = apply(recipe(folder, [CUT, STUDENTS["dmd"], {"interpolate": {"start_share": share}}]), folder / "run")
    assert statuses(run) == {"prune": "cached", "dmd": "cached", "interpolate": "ran"}


def test_a_model_that_has_moved_is_found(folder: Path) -> None:
    """Nothing was cut, so that the start is the model itself."""
    passes = [STUDENTS["dmd"], {"interpolate": {"start_share": 0.25}}]
    apply(recipe(folder, passes), folder / "run")
    before = weights(RunDirectory(folder / "run").final().components["transformer"])
    shutil.move(folder / "model", folder / "elsewhere")
    program = RunDirectory(folder / "run", folder / "elsewhere").final()
    assert program.components[FEW_STEP_START] == (folder / "elsewhere" / "transformer").resolve()
    path = recipe(folder, [STUDENTS["dmd"], {"interpolate": {"start_share": 0.5}}])
    path.write_text(path.read_text().replace("path: model", "path: elsewhere"))
    run = apply(path, folder / "run")
    assert statuses(run)["dmd"] == "cached"
    after, start = weights(run.final().components["transformer"]), weights(folder / "elsewhere" / "transformer")
    name = max(start, key=lambda one: float((before[one] - start[one]).abs().max()))
    # Half of the way from the student instead of a quarter: two thirds of what was left of it.
    torch.testing.assert_close(after[name] - start[name], (before[name] - start[name]) / 1.5, rtol=1e-4, atol=1e-6)


def test_only_a_few_step_student_has_a_start(folder: Path) -> None:
    with pytest.raises(PreconditionError, match="interpolate: needs the program to be few-step"):
        apply(recipe(folder, [CUT, {"interpolate": {"start_share": 0.25}}]), folder / "run")
    assert not (folder / "run").exists()


def test_a_student_of_an_earlier_version_is_named(folder: Path) -> None:
    run = apply(recipe(folder, [CUT, STUDENTS["dmd"]]), folder / "run")
    stored = run.entries()[-1].folder
    record = json.loads((stored / "program.json").read_text())
    del record["components"][FEW_STEP_START]
    (stored / "program.json").write_text(json.dumps(record))
    with pytest.raises(PreconditionError) as failure:
        apply(recipe(folder, [CUT, STUDENTS["dmd"], {"interpolate": {"start_share": 0.25}}]), folder / "run")
    assert str(failure.value) == (
        f"interpolate: {stored.resolve()} does not name the weights that its training started from, which earlier "
        "versions did not note; delete that folder and apply the recipe again, or leave interpolate out"
    )


def test_blocks_cannot_go_in_between(folder: Path) -> None:
    with pytest.raises(PreconditionError, match="blocks were cut in between: put interpolate before prune"):
        apply(recipe(folder, [STUDENTS["dmd"], CUT, {"interpolate": {"start_share": 0.25}}]), folder / "run")
