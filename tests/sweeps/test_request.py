from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flcompress.core.program import Fact
from flcompress.errors import RequestError
from flcompress.sweeps.request import read_request

RECIPE = {
    "version": 1,
    "model": {"path": "model"},
    "data": {"moving-digits": {"clips": 140}},
    "exports": ["diffusers"],
    "passes": [
        {"importance": {"draws": 8}},
        {"stochastic-depth": {"remove": 0.2, "steps": 1}},
        {"prune": {"remove": 0.2}},
        {"dmd": {"steps": 1, "student_steps": 2}},
    ],
    "evaluation": {"clips_per_prompt": 1, "seeds": 2},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (tmp_path / "model").mkdir()
    return file


def sweep(recipe: Path, **content: object) -> Path:
    file = recipe.parent / "grid.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "recipe": "base.yaml", **content}, sort_keys=False))
    return file


def test_a_recipe_with_axes_is_a_grid(recipe: Path) -> None:
    request = read_request(recipe, ["passes.dmd.student_steps=1,2,4", "prune.remove=0.2,.3"], 2)
    assert [cell.name for cell in request.cells] == [
        f"student-steps-{steps}-remove-0-{share}" for steps in (1, 2, 4) for share in (2, 3)
    ]
    assert (request.seeds, request.evaluation.seeds, request.base) == (2, 2, request.cells[0])
    last = request.cells[-1].load(1)
    assert (last.seed, last.name) == (1, "student-steps-4-remove-0-3-1")
    assert [step.model_dump().get("remove") for step in last.passes] == [None, 0.2, 0.3, None]
    assert last.passes[-1].model_dump()["student_steps"] == 4
    assert not last.exports


def test_a_recipe_alone_is_trained_with_several_seeds(recipe: Path) -> None:
    (cell,) = (request := read_request(recipe, [], 2)).cells
    assert (request.seeds, cell.name) == (2, "base")
    assert [(loaded.name, loaded.seed) for loaded in map(cell.load, range(2))] == [("base-0", 0), ("base-1", 1)]


def test_a_star_is_every_pass_and_a_share_of_0_leaves_it_out(recipe: Path) -> None:
    none, half = read_request(recipe, ["*.remove=0,0.5"]).cells
    assert [step.name for step in none.load(0).passes] == ["importance", "dmd"]
    assert [step.model_dump().get("remove") for step in half.load(0).passes] == [None, 0.5, 0.5, None]


def test_variants_and_axes_are_combined_and_the_base_comes_first(recipe: Path) -> None:
    file = sweep(
        recipe,
        axes={"dmd.inter_cfg": [[1, 1], [3, 4]]},
        variants=[
            {"name": "plain"},
            {"name": "without", "without": ["stochastic-depth"], "set": {"dmd.batch": 2, "training.precision": "bf16"}},
        ],
        base="without-inter-cfg-3-4",
        evaluation={"clips_per_prompt": 5, "seeds": 3},
    )
    request = read_request(file)
    assert [cell.name for cell in request.cells] == [
        "without-inter-cfg-3-4", "plain-inter-cfg-1-1", "plain-inter-cfg-3-4", "without-inter-cfg-1-1"
    ]  # fmt: skip
    loaded = request.base.load(0)
    assert [step.name for step in loaded.passes] == ["importance", "prune", "dmd"]
    assert (loaded.passes[-1].model_dump()["batch"], loaded.training.precision) == (2, "bf16")
    assert request.evaluation.clips_per_prompt == 5


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (["passes.dmd.student_stepz=1"], "cell student-stepz-1: .*unknown key; did you mean 'student_steps'"),
        (["dmdd.steps=1"], "the recipe has no pass or section 'dmdd'; did you mean 'dmd'"),
        (["*.remov=0.1"], "no pass has an argument remov; did you mean 'remove'"),
        (["prune.remove=0.2,1.5"], "cell remove-1-5: .*1.5 given, expected .*below 1"),
        (["seed=1,2"], "the sweep sets it itself"),
        (["dmd.steps"], "--axis dmd.steps: expected KEY=VALUE,VALUE"),
        (["dmd.steps="], "--axis dmd.steps=: expected KEY=VALUE,VALUE"),
        (["dmd.steps=1,1"], "two cells are named steps-1"),
        (["importance.draws=" + ",".join(map(str, range(8, 58))), "dmd.steps=" + ",".join(map(str, range(1, 22)))],
         "1,050 cells with 3 seeds each, expected at most 1,000; give --yes"),
        ([], "neither axes nor variants given"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_the_cell(recipe: Path, axes: list[str], expected: str) -> None:
    with pytest.raises(RequestError, match=expected) as fault:
        read_request(recipe, axes)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"axes": {"dmd.steps": [1]}, "seeds": 0}, r"grid.yaml:\d+: seeds: 0 given, expected a whole number"),
        ({"axes": {"dmd.steps": []}}, r"grid.yaml:\d+: axes"),
        ({"axis": {"dmd.steps": [1]}}, "axis: unknown key; did you mean 'axes'"),
        ({"variants": [{"name": "Big"}]}, r"grid.yaml:\d+: variants"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "two cells are named a"),
        ({"variants": [{"name": "a", "without": ["dmdd"]}]}, "cell a: without: dmdd given, but .*did you mean 'dmd'"),
        ({"variants": [{"name": "a", "without": ["importance"]}]}, "cell a: .*needs the program to be scored"),
        ({"variants": [{"name": "a", "recipe": "gone.yaml"}]}, "recipe gone.yaml: no such file next to the sweep"),
        ({"variants": [{"name": "a"}], "base": "b"}, "base: b given, but no cell has that name"),
    ],
)
def test_faults_of_a_file_are_one_line(recipe: Path, content: dict[str, object], expected: str) -> None:
    with pytest.raises(RequestError, match=expected) as fault:
        read_request(sweep(recipe, **content))
    assert "\n" not in str(fault.value)


def test_the_methods_of_the_field_train_with_the_same_number_of_network_calls() -> None:
    """A forward counts as one, a backward as two; of what makes few steps, not of what comes before it."""
    calls = {}
    for cell in read_request(Path("recipes/sweeps/field.yaml")).cells:
        share = 1.0
        for step in cell.load(0).passes:
            if Fact.FEW_STEP in step.gives:
                calls[cell.name] = step.cost(share, 1, 1.0).forwards
            share = step.remaining(share)
    assert calls == pytest.approx(dict.fromkeys(calls, calls["ours"]), rel=0.03)


def test_shipped_sweeps_are_read() -> None:
    for file in sorted(Path("recipes/sweeps").glob("*.yaml")):
        assert len(read_request(file).cells) >= 4, file
