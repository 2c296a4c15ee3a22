"""Folders with a scheduler that people put in: sampled at its levels, as the stock pipeline samples them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest

from flcompress.driver.manager import apply, check
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source
from flcompress.errors import ModelError
from flcompress.frontend.loading import load_recipe
from flcompress.progress import QuietDisplay
from tests.families.test_sampling import contracts, require_same

# diffusers hands tensors to numpy in ways that the newest numpy deprecates.
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")]

FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
LTX = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}


def swapped(folder: Path, target: Path, name: str, **config: Any) -> Path:
    """A copy of a pipeline folder with another scheduler."""
    shutil.copytree(folder, target)
    shutil.rmtree(target / "scheduler")
    getattr(diffusers, name).from_config(config).save_pretrained(str(target / "scheduler"))
    named(target, name)
    return target


def named(folder: Path, name: str) -> None:
    """Let `model_index.json`, which decides what stock diffusers loads, name a scheduler class."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))


@pytest.mark.parametrize(
    ("name", "scheduler", "config"),
    [
        ("wan", "DPMSolverMultistepScheduler", FLOW | {"flow_shift": 5.0}),
        ("wan-i2v", "UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}),
        ("wan-ti2v", "UniPCMultistepScheduler", FLOW | {"flow_shift": 5.0}),
        ("hunyuan-video", "UniPCMultistepScheduler", FLOW | {"flow_shift": 7.0}),
        ("ltx", "UniPCMultistepScheduler", FLOW | LTX | {"shift_terminal": 0.1}),
        ("flux", "DPMSolverMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
        ("flux", "UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}),
        ("sd3", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        ("cogvideox", "CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "timestep_spacing": "linspace"}),
        ("cogvideox", "CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "steps_offset": 1}),
    ],
)
def test_a_teacher_is_sampled_by_the_scheduler_of_its_folder(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, name: str, scheduler: str, config: dict[str, Any]
) -> None:
    folder = swapped(pipeline_folder(name), tmp_path / name, scheduler, **config)
    teacher, student = contracts(folder, name)
    assert teacher.scheduler_class == scheduler
    require_same(folder, name, teacher, own=True)
    assert student.timesteps[0] == pytest.approx(999.0 if name == "cogvideox" else 1000.0)


def recipe(folder: Path, model: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"version: 1\nmodel: {{path: {model}}}\nexports: [diffusers]\nsampling:\n"
        "  {num_inference_steps: 4, max_sequence_length: 16, num_frames: 9, height: 32, width: 32}\n"
    )
    return path


def test_the_class_is_the_one_that_stock_diffusers_loads(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The configuration was saved by one class and is named as another's, as after an edit by hand."""
    config = FLOW | {"flow_shift": 3.0}
    folder = swapped(pipeline_folder("wan"), tmp_path / "wan", "UniPCMultistepScheduler", **config)
    named(folder, "DEISMultistepScheduler")
    contract = read_source(load_recipe(recipe(tmp_path, folder))).contract
    assert contract.scheduler_class == "DEISMultistepScheduler"
    loaded = diffusers.WanPipeline.from_pretrained(str(folder), use_safetensors=True).scheduler
    loaded.set_timesteps(4)
    assert list(contract.sigmas) == loaded.sigmas[:-1].tolist()


def test_a_scheduler_that_cannot_be_followed_is_refused_before_any_work(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = swapped(pipeline_folder("wan"), tmp_path / "wan", "FlowMatchHeunDiscreteScheduler")
    with pytest.raises(ModelError, match=r"scheduler_config\.json: scheduler: FlowMatchHeunDiscreteScheduler given"):
        check(load_recipe(recipe(tmp_path, folder)), RunDirectory(tmp_path / "run"))
    named(folder, "UniPCMultistepScheduler")
    with pytest.raises(ModelError, match="use_flow_sigmas False"):
        apply(recipe(tmp_path, folder), tmp_path / "run", display=QuietDisplay())
    assert not (tmp_path / "run").exists()


def test_a_student_that_cannot_be_is_refused_before_any_work(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A discrete student starts at the last timestep only where its steps divide them."""
    text = recipe(tmp_path, pipeline_folder("cogvideox")).read_text()
    (tmp_path / "recipe.yaml").write_text(
        f"{text}data: {{latents: nowhere}}\npasses: [{{dmd: {{student_steps: 3, steps: 1}}}}]\n"
    )
    with pytest.raises(ModelError, match=r"dmd\.student_steps: 3 given, expected a divisor of the scheduler's 1000"):
        check(load_recipe(tmp_path / "recipe.yaml"), RunDirectory(tmp_path / "run"))


def test_a_scheduler_whose_noise_is_left_out_is_exported_and_named(
    pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = swapped(pipeline_folder("wan"), tmp_path / "wan", "SASolverScheduler", **FLOW)
    run = apply(recipe(tmp_path, folder), tmp_path / "run", display=QuietDisplay(), device="cpu")
    made = run.exports / "diffusers"
    assert json.loads((made / "model_index.json").read_text())["scheduler"] == ["diffusers", "SASolverScheduler"]
    assert "The scheduler is the model's own SASolverScheduler" in (made / "README.md").read_text()
