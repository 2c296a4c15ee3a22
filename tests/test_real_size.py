"""The recipes of real size load and plan from configurations alone, with the parameter counts of the real models."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flcompress.driver.manager import check
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source
from flcompress.errors import DataError, ModelError
from flcompress.frontend.loading import load_recipe
from flcompress.planning.machines import gpu_machine
from flcompress.planning.plan import make_plan
from flcompress.planning.text import plan_text

pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
REAL = {
    "wan2.1-t2v-1.3b": (1_418_996_800, (16, 21, 60, 104)),
    "wan2.1-t2v-14b": (14_288_491_584, (16, 21, 60, 104)),
    "wan2.2-t2v-a14b-high": (14_288_491_584, (16, 21, 60, 104)),
    "wan2.2-t2v-a14b-low": (14_288_491_584, (16, 21, 60, 104)),
    "wan2.2-ti2v-5b": (4_999_787_712, (48, 31, 44, 80)),
    "hunyuanvideo": (12_821_012_544, (16, 33, 90, 160)),
    "cogvideox-5b": (5_570_283_072, (16, 13, 60, 90)),
}


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_is_read_from_its_configuration(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    check(recipe, RunDirectory(tmp_path / "run"), plan=True)
    source = read_source(recipe)
    assert (source.graph.parameters, source.latents) == REAL[name]
    assert source.graph.flops > 1e14


def test_a_plan_for_a_gpu(tmp_path: Path) -> None:
    """At a small size, to be quick."""
    recipe = load_recipe(
        RECIPES / "wan2.1-t2v-1.3b.yaml", ["sampling.num_frames=9", "sampling.height=64", "sampling.width=64"]
    )
    text = plan_text(make_plan(recipe, machine=gpu_machine(recipe, "h100")))
    assert "hours on 1 x H100 80 GB at 40 % of the stated speed" in text
    assert "memory: every pass fits a H100 80 GB" in text
    assert "fake score 11.4 GB" in text  # 1.42 G x (4 weights + 4 of one moment)
    assert "memory: more than a RTX 4090 24 GB has for " in plan_text(
        make_plan(recipe, machine=gpu_machine(recipe, "rtx4090"))
    )


ALONE = ["training.engine=local", "passes.stochastic-depth.batch=1", "passes.dmd.batch=1"]


def test_the_largest_wan_is_planned_in_seconds_and_fits_16_gpus() -> None:
    own = load_recipe(RECIPES / "wan2.1-t2v-14b.yaml")
    assert make_plan(own, machine=gpu_machine(own, "h100", 16)).fits
    recipe = load_recipe(RECIPES / "wan2.1-t2v-14b.yaml", ALONE)
    started = time.process_time()
    plan = make_plan(recipe, machine=gpu_machine(recipe, "h100", 16))
    assert time.process_time() - started < 40
    assert not plan.fits
    assert plan.advice is not None
    assert plan.advice.lines()[0] == (
        "training: {engine: fsdp2, precision: bf16, gradient_checkpointing: true, processes: 16}"
    )
    assert plan.advice.batches == {"stochastic-depth": 16, "dmd": 16}


def test_a_plan_of_two_experts_counts_both(tmp_path: Path) -> None:
    """40 steps at shift 3: the low-noise expert answers 27 of them."""
    small = ["sampling.num_frames=9", "sampling.height=64", "sampling.width=64"]
    recipe = load_recipe(RECIPES / "wan2.2-t2v-a14b-low.yaml", ["training.processes=1", *small, *ALONE])
    text = plan_text(make_plan(recipe, machine=gpu_machine(recipe, "h100")))
    assert "partner 28.6 GB" in text
    assert "80 evaluations a sample" in text
    # The partner was not named: it is still guided, two evaluations at each of the student's first two steps.
    assert "end: 6 evaluations with 68.0 % of the parameters of the low-noise expert: 14.92x less work a sample" in text


def test_configurations_can_be_planned_with_but_not_run(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "wan2.1-t2v-1.3b.yaml")
    with pytest.raises((ModelError, DataError), match=r"wan2\.1-t2v-1\.3b/text_encoder: no such folder"):
        check(recipe, RunDirectory(tmp_path / "run"))
