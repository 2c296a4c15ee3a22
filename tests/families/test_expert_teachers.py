"""A model of two experts before anything is done to it: seen, sampled, and asked for in the wrong way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flcompress.core.records import FactsFile
from flcompress.diffusion.contract import SamplingContract
from flcompress.driver.manager import apply, check
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.frontend.loading import load_recipe
from flcompress.inspection.model import inspect_model
from flcompress.inspection.text import inspection_text
from flcompress.models.configs import read_json
from flcompress.models.parts import open_parts
from flcompress.progress import QuietDisplay
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.generate import _denoiser, denoise
from tests.families.exports import PROMPT, first_frame, other_boundary
from tests.families.pipelines import EXPERTS
from tests.fixtures.rounding import require_rounded
from tests.training.comparing import FORWARD

pytestmark = pytest.mark.e2e


def test_an_inspection_shows_both_experts(pipeline_folder: Callable[[str], Path]) -> None:
    found = inspect_model(str(pipeline_folder("wan-a14b")), height=64, width=64, frames=9)
    text = inspection_text(found)
    assert "one of two experts: it answers the timesteps from 875 (high noise)" in text
    assert "transformer_2: the other expert, timesteps below 875 (low noise): WanTransformer3DModel, 6 blocks" in text
    (other,) = found.to_dict()["other_transformers"]
    assert (other["name"], other["blocks"], other["timesteps"]) == ("transformer_2", 6, "below 875")


@pytest.mark.parametrize("name", EXPERTS)
def test_the_teacher_pair_is_sampled_as_its_stock_pipeline_samples_it(
    pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    """Guided by two scales, along the ODE."""
    import diffusers

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{path: {pipeline_folder(name)}, expert: low}}\nexports: [diffusers]\nsampling:\n"
        "  {num_inference_steps: 6, guidance_scale: 4.0, guidance_scale_2: 2.0, max_sequence_length: 16,\n"
        "   num_frames: 9, height: 32, width: 32}\n"
    )
    run = apply(recipe, tmp_path / "run", display=QuietDisplay(), device="cpu")
    folder = run.path / "exports" / "diffusers"
    facts = FactsFile.read(folder / "flcompress.json")
    assert (facts.call["guidance_scale"], facts.call["guidance_scale_2"]) == (4.0, 2.0)
    before = read_json(pipeline_folder(name) / "scheduler" / "scheduler_config.json", "")
    assert read_json(folder / "scheduler" / "scheduler_config.json", "") == before  # nothing was distilled
    given, first = first_frame(folder, facts)
    pipeline = getattr(diffusers, facts.pipeline_class).from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    stock = pipeline(prompt=PROMPT, **given, **facts.call, output_type="latent").frames
    ours = denoise(_denoiser(run.path, choose_backend("torch"), facts), open_parts(folder), facts, PROMPT, 2, first)
    contract = SamplingContract.from_dict(facts.contract.dump())
    moved = other_boundary(facts, 4)
    other = denoise(_denoiser(run.path, choose_backend("torch"), moved), open_parts(folder), moved, PROMPT, 2, first)
    require_rounded(ours, stock, contract.evaluations * FORWARD, planted=other)


@pytest.mark.parametrize(
    ("name", "model", "more", "message"),
    [
        (
            "wan-a14b",
            "",
            "",
            r"recipe\.yaml:2: model\.expert: nothing given, but this WanPipeline has two experts; expected high "
            r"\(transformer, timesteps from 875\) or low \(transformer_2, those below\): a recipe compresses one",
        ),
        (
            "wan",
            ", expert: low",
            "",
            r"model\.expert: low given, but this WanPipeline has one transformer; leave it out",
        ),
        (
            "wan",
            "",
            "sampling: {guidance_scale_2: 3.0}",
            r"recipe\.yaml:3: sampling\.guidance_scale_2: 3\.0 given, but this WanPipeline has one transformer",
        ),
        (
            "wan-a14b",
            ", expert: low, partner: nowhere",
            "",
            r"recipe\.yaml:2: model\.partner: no folder .*nowhere.*; give the path of a diffusers pipeline folder",
        ),
        (
            "wan-a14b",
            ", expert: low, partner: .",
            "",
            r"model\.partner: .* has no flcompress\.json; expected the diffusers export of another recipe, "
            "RUN/exports/diffusers",
        ),
    ],
)
def test_what_does_not_fit_the_experts_is_one_line(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, name: str, model: str, more: str, message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nmodel: {{path: {pipeline_folder(name)}{model}}}\n{more}\n")
    with pytest.raises(RequestError, match=message):
        check(load_recipe(recipe), RunDirectory(tmp_path / "run"))
