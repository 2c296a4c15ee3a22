from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import flcompress
from flcompress import commands
from flcompress.diffusion.student import student_contract
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError, RequestError
from flcompress.evaluation.comparison import evaluate, evaluate_contenders
from flcompress.evaluation.contenders import Contender, run_contenders
from flcompress.models.parts import open_parts
from flcompress.moving_digits.figures import AVERAGED
from flcompress.progress import QuietDisplay
from flcompress.runtime.backends.options import choose_backends
from tests.evaluation.conftest import make_run

pytestmark = pytest.mark.e2e

NAMES = ["teacher-3", "teacher-2", "raw-pruned", "stochastic-depth-full", "stochastic-depth-pruned", "student"]
METRICS = {*AVERAGED, "frechet", "prompt_accuracy", "speed_accuracy", "average", "identity", "frechet_fixed"}


class Count:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int, values: Mapping[str, float]) -> None:
        self.calls.append((done, total))


@pytest.fixture(scope="module")
def first(run: RunDirectory) -> tuple[dict[str, Any], Count]:
    count = Count()
    return evaluate(run, 1, 2, count), count


def test_a_run_gives_its_contenders_in_order(first: tuple[dict[str, Any], Count]) -> None:
    results, count = first
    rows = results["contenders"]
    assert [row["name"] for row in rows] == NAMES
    assert [row["evaluations"] for row in rows] == [6, 4, 6, 6, 6, 2]
    assert rows[0]["parameters"] > rows[2]["parameters"] == rows[4]["parameters"] == rows[5]["parameters"]
    assert count.calls[-1] == (60, 60)  # two seeds, one batch each
    for row in rows:
        assert set(row) >= METRICS
        assert len(row["frechet"]["values"]) == 2
        assert row["frechet"]["low"] <= row["frechet"]["mean"] <= row["frechet"]["high"]


@pytest.mark.usefixtures("first")
def test_what_lies_between_teacher_and_student_is_compared_as_asked(run: RunDirectory) -> None:
    """By the command, or by the recipe, which the command overrides; the picture has who was compared."""
    outer = ["teacher-3", "teacher-2", "student"]
    size: dict[str, Any] = {"clips_per_prompt": 1, "seeds": 2, "display": QuietDisplay()}
    without = commands.evaluate(run.path, stages=False, **size)
    assert [row["name"] for row in without["contenders"]] == outer
    recipe = run.path / "recipe.yaml"
    text = recipe.read_text()
    try:
        assert "stages: true" in text
        recipe.write_text(text.replace("stages: true", "stages: false"))
        assert [row["name"] for row in commands.evaluate(run.path, **size)["contenders"]] == outer
        assert [row["name"] for row in commands.evaluate(run.path, stages=True, **size)["contenders"]] == NAMES
    finally:
        recipe.write_text(text)


def test_reality_is_the_floor(first: tuple[dict[str, Any], Count]) -> None:
    results, _ = first
    floor = results["floor"]
    assert floor["frechet"]["high"] < min(row["frechet"]["low"] for row in results["contenders"])
    assert floor["prompt_accuracy"]["mean"] > 0.9
    assert floor["motion_smoothness"]["mean"] > 0.9
    assert floor["dynamic_degree"]["mean"] == 1.0
    assert floor["imaging_quality"]["mean"] > 0.9
    assert floor["identity"]["mean"] > 0.9
    assert floor["frechet_fixed"]["high"] < min(row["frechet_fixed"]["low"] for row in results["contenders"])
    assert results["classifier"]["digit_accuracy"] > 0.95


def test_differences_are_paired_by_seed(first: tuple[dict[str, Any], Count]) -> None:
    results, _ = first
    rows = {row["name"]: row for row in results["contenders"]}
    (found,) = [p for p in results["paired"] if (p["a"], p["b"], p["metric"]) == ("student", "teacher-3", "frechet")]
    assert found["mean"] == pytest.approx(rows["student"]["frechet"]["mean"] - rows["teacher-3"]["frechet"]["mean"])


def test_results_and_pictures_are_written(run: RunDirectory, first: tuple[dict[str, Any], Count]) -> None:
    results, _ = first
    assert results["program"] == run.entries()[-1].key
    assert json.loads((run.path / "eval" / "results.json").read_text(encoding="utf-8")) == results
    for row in results["contenders"]:
        assert (run.path / row["strip"]).stat().st_size > 0
    with Image.open(run.path / "eval" / "comparison.gif") as picture:
        assert getattr(picture, "n_frames", 1) == 9
    assert (run.path / "eval" / "strips" / "comparison.png").exists()


def test_a_second_evaluation_samples_nothing(run: RunDirectory, first: tuple[dict[str, Any], Count]) -> None:
    count = Count()
    assert evaluate(run, 1, 2, count) == first[0]
    assert count.calls == []


def test_more_seeds_sample_only_those(run: RunDirectory, first: tuple[dict[str, Any], Count]) -> None:
    count = Count()
    results = evaluate(run, 1, 3, count, ["student"])
    assert count.calls[-1] == (2, 2)
    assert results["contenders"][0]["frechet"]["values"][:2] == first[0]["contenders"][-1]["frechet"]["values"]
    assert json.loads((run.path / "eval" / "results.json").read_text(encoding="utf-8"))["seeds"] == 2


def test_a_run_without_stages_has_the_teacher_alone(model: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path, model, stages=False)
    assert [contender.name for contender in run_contenders(bare)] == ["teacher-3", "teacher-4"]


def test_unknown_contender_is_named(run: RunDirectory) -> None:
    with pytest.raises(RequestError, match=r"contender 'studnet': .* has teacher-3, teacher-2, .*student"):
        evaluate(run, 1, 2, None, ["studnet"])


@pytest.mark.parametrize(
    ("clips", "seeds", "message"),
    [(1, 1, "seeds: 1 given, expected at least 2"), (0, 2, "clips_per_prompt: 0 given, expected at least 1")],
)
def test_sizes_are_checked(run: RunDirectory, clips: int, seeds: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        evaluate(run, clips, seeds)


def test_another_dataset_has_no_classifier(model: Path, tmp_path: Path) -> None:
    (tmp_path / "encoded").mkdir()
    other = make_run(tmp_path, model, data="{latents: encoded}", stages=False)
    with pytest.raises(RequestError, match="data: latents given, expected moving-digits; only that benchmark"):
        evaluate(other, 1, 2)


def test_contenders_meet_the_same_noises(run: RunDirectory, model: Path) -> None:
    """Also the same again noises: two names for one network give one set of clips."""
    contract = student_contract(run.final().teacher_contract, 2)
    seen: list[torch.Tensor] = []

    def network(x: torch.Tensor, timestep: torch.Tensor, given: object) -> torch.Tensor:
        seen.append(x)
        return 0.5 * x

    pair = [Contender(name=n, label=n, network=network, contract=contract, parameters=1) for n in "ab"]
    results, shown = evaluate_contenders(pair, parts=open_parts(model), clips_per_prompt=1, seeds=2)
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(shown["a"], shown["b"])
    assert all(row["mean"] == 0.0 for row in results["paired"])


def test_values_that_are_not_finite_name_the_contender(run: RunDirectory, model: Path) -> None:
    broken = Contender(
        name="broken",
        label="broken",
        network=lambda x, timestep, given: x * float("nan"),
        contract=run.final().contract,
        parameters=1,
    )
    with pytest.raises(FlcompressError, match="broken: its latents are not finite at seed 0"):
        evaluate_contenders([broken], parts=open_parts(model), clips_per_prompt=1, seeds=2)


def test_the_suite_gives_the_figures_and_the_keys_that_the_benchmark_always_had(
    run: RunDirectory, first: tuple[dict[str, Any], Count]
) -> None:
    results = flcompress.evaluate(run, clips_per_prompt=1, seeds=2, display=QuietDisplay())
    assert results == first[0]
    assert list(results) == [
        "program", "benchmark", "clips", "seeds", "prompts", "reference_clips", "classifier", "floor", "contenders",
        "paired",
    ]  # fmt: skip
    facts = {"name", "label", "steps", "guidance", "evaluations", "parameters", "strip"}
    assert all(set(row) == facts | METRICS for row in results["contenders"])


def test_a_backend_needs_a_student_and_its_export(run: RunDirectory, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"exports/onnx.*: flcompress export .* --format onnx"):
        evaluate(run, 1, 2, backends=choose_backends(["onnx"]))
    bare = make_run(tmp_path, model, stages=False)
    with pytest.raises(RequestError, match=r"--backend: torch given, but .* has trained no student to run"):
        evaluate(bare, 1, 2, backends=choose_backends(["torch"]))


def test_the_teacher_is_judged_at_other_guidance(run: RunDirectory, first: tuple[dict[str, Any], Count]) -> None:
    """Text guidance of 1 is the contract's own here; b2 adds a call of the pruned teacher to every step."""
    count = Count()
    names = ["teacher-3", "guided-1-0", "guided-1-0.5", "guided-3-0.5"]
    results = evaluate(run, 1, 2, count, names, guidances=[(1.0, 0.0), (1.0, 0.5), (3.0, 0.5)])
    teacher, same, intra, both = results["contenders"]
    assert [row["evaluations"] for row in results["contenders"]] == [6, 3, 6, 9]
    assert both["label"] == "teacher, b1 = 3, b2 = 0.5"
    assert count.calls[-1] == (2 * (3 + 6 + 9), 2 * (3 + 6 + 9))  # the teacher's own are in the cache
    values = [row["frechet"]["values"] for row in (teacher, same, intra, both)]
    assert len({tuple(each) for each in values}) == 4


def test_guidance_away_from_the_pruned_teacher_needs_one(model: Path, tmp_path: Path) -> None:
    bare = make_run(tmp_path, model, stages=False)
    assert run_contenders(bare, guidances=[(2.0, 0.0)])[-1].name == "guided-2-0"
    with pytest.raises(RequestError, match=r"--guidance: 2 0.5 given, but the run prunes no block to guide away from"):
        run_contenders(bare, guidances=[(2.0, 0.5)])
