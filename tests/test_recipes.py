"""The shipped recipes: all of them load and pass their checks; the smoke recipe runs whole on the real teacher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from diffusers import WanPipeline

from flcompress.cli import main
from flcompress.driver.manager import check
from flcompress.driver.rundir import RunDirectory
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.frontend.loading import load_recipe

pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).parents[1] / "recipes"
TEACHER_BYTES = 25 * 1024 * 1024


@pytest.mark.parametrize(
    "path", sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("field/*.yaml")]), ids=lambda path: path.name
)
def test_every_recipe_passes_the_checks_before_any_work(path: Path, tmp_path: Path) -> None:
    check(load_recipe(path), RunDirectory(tmp_path / "run"), plan=True)  # real models are here as configurations
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_small_enough_for_the_repository() -> None:
    teacher = RECIPES / "moving-digits" / "teacher"
    assert sum(path.stat().st_size for path in teacher.rglob("*") if path.is_file()) <= TEACHER_BYTES


@pytest.mark.slow
def test_the_smoke_recipe_runs_every_pass_and_exporter(tmp_path: Path) -> None:
    TensorRTExporter().check()
    run = tmp_path / "smoke"
    command = ["apply", str(RECIPES / "smoke.yaml"), "--run-dir", str(run)]
    first = CliRunner().invoke(main, command)
    assert first.exit_code == 0, first.output

    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0
    assert "nothing to do" in again.output

    manifest = json.loads((run / "exports/tensorrt/manifest.json").read_text())
    contract = RunDirectory(run).final().contract
    assert manifest["sigmas"] == list(contract.sigmas)
    pipe = WanPipeline.from_pretrained(str(run / "exports/diffusers"))
    pipe.scheduler.set_timesteps(4)
    assert tuple(pipe.scheduler.sigmas[:-1].tolist()) == contract.sigmas
    assert len(pipe.transformer.blocks) == 11

    shown = CliRunner().invoke(
        main,
        ["generate", str(run), "--prompt", "a three drifting right, fast", "--backend", "onnx", "--out",
         str(tmp_path / "clip.gif")],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "clip.gif").stat().st_size > 0
    report = CliRunner().invoke(main, ["report", str(run)])
    assert report.exit_code == 0, report.output
    assert (run / "report.html").is_file()
