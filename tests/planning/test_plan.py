from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.driver.start import read_source, trace_folder
from flcompress.frontend.loading import load_recipe
from flcompress.planning.machines import measure_speed
from flcompress.planning.plan import make_plan
from flcompress.planning.text import plan_text
from tests.fixtures.recipes import WriteRecipe

GOLDEN = Path(__file__).parent.parent / "golden" / "plan.txt"


def test_the_plan_as_text(write: WriteRecipe, model: Path) -> None:
    recipe = load_recipe(write("passes:\n  - score\n  - cut: {keep: 0.7}\nexports: [text]\n"))
    text = plan_text(make_plan(recipe, flops_per_second=1e9)).replace(str(model), "MODEL") + "\n"
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_work_ratio(write: WriteRecipe) -> None:
    """Whole blocks go: two of four, where 30 % are more than one."""
    recipe = load_recipe(write("passes: [score, {cut: {keep: 0.7}}]\n"))
    plan = make_plan(recipe, flops_per_second=1e9)
    gone = sum(block.parameters for block in read_source(recipe).graph.blocks[:2])
    assert plan.evaluations == 100
    assert plan.final_evaluations == 4
    assert plan.to_dict()["passes"][1]["parameters"] == plan.parameters - gone < 0.7 * plan.parameters
    assert plan.work_ratio == pytest.approx(25 * plan.parameters / (plan.parameters - gone))


def test_a_plan_without_passes(write: WriteRecipe) -> None:
    plan = make_plan(load_recipe(write("")), flops_per_second=1e9)
    assert plan.work_ratio == 1.0
    assert "100 evaluations with 100.0 % of the parameters" in plan_text(plan)


def test_the_speed_is_measured(model: Path) -> None:
    transformer = model / "transformer"
    assert measure_speed(transformer, trace_folder(transformer, 16), 16, (3, 8, 8)) > 0
