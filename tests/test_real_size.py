"""The recipes of real size load and plan from configurations alone, with the parameter counts of the real models."""

from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.errors import DataError, ModelError
from flcompress.pipeline.gpus import GPUS
from flcompress.pipeline.manager import check, check_plan
from flcompress.pipeline.plan import make_plan, plan_text
from flcompress.pipeline.recipe_loading import load_recipe
from flcompress.pipeline.rundir import RunDirectory
from flcompress.pipeline.start import read_source

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
REAL = {
    "wan2.1-t2v-1.3b": (1_418_996_800, (16, 21, 60, 104)),
    "wan2.1-t2v-14b": (14_288_491_584, (16, 21, 60, 104)),
    "wan2.2-ti2v-5b": (4_999_787_712, (48, 31, 44, 80)),
    "hunyuanvideo": (12_821_012_544, (16, 33, 90, 160)),
    "cogvideox-5b": (5_570_283_072, (16, 13, 60, 90)),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_is_read_from_its_configuration(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    check_plan(recipe, RunDirectory(tmp_path / "run"))
    source = read_source(recipe)
    assert (source.graph.parameters, source.latents) == REAL[name]
    assert source.graph.flops > 1e14


def test_a_plan_for_a_gpu(tmp_path: Path) -> None:
    """At a small size, to be quick."""
    recipe = load_recipe(
        RECIPES / "wan2.1-t2v-1.3b.yaml", ["sampling.num_frames=9", "sampling.height=64", "sampling.width=64"]
    )
    text = plan_text(make_plan(recipe, gpu=GPUS["h100"]))
    assert "hours of one H100 80 GB at 40% of its stated speed" in text
    assert "memory: one H100 80 GB holds every pass" in text
    assert "fake score 22.7 GB" in text
    assert "memory: more than one RTX 4090 24 GB has; " in plan_text(make_plan(recipe, gpu=GPUS["rtx4090"]))


def test_configurations_can_be_planned_with_but_not_run(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "wan2.1-t2v-1.3b.yaml")
    with pytest.raises((ModelError, DataError), match=r"wan2\.1-t2v-1\.3b/text_encoder: no such folder"):
        check(recipe, RunDirectory(tmp_path / "run"))
