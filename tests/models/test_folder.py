from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flcompress.errors import ModelError
from flcompress.models.folder import check_pipeline
from flcompress.models.loading import load_transformer
from tests.fixtures.tiny import tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
PART = ["diffusers", "WanTransformer3DModel"]


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return tiny_pipeline(tmp_path / "model", layers=2)


def test_a_whole_folder_passes(pipeline: Path) -> None:
    assert check_pipeline(pipeline)["_class_name"] == "WanPipeline"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model folder; expected a diffusers pipeline folder"):
        check_pipeline(tmp_path / "nowhere")


def test_a_truncated_file_is_named(pipeline: Path) -> None:
    path = pipeline / "transformer" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{WEIGHTS}: not a whole safetensors file \(.*\); copy the file again"):
        check_pipeline(pipeline)


def test_a_tensor_that_is_not_finite_is_named(pipeline: Path) -> None:
    path = pipeline / "transformer" / WEIGHTS
    tensors = load_file(str(path))
    tensors["proj_out.bias"] = torch.full_like(tensors["proj_out.bias"], float("nan"))
    save_file(tensors, str(path), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor proj_out\.bias holds values that are not finite"):
        check_pipeline(pipeline)


def test_a_pickle_checkpoint_is_refused(pipeline: Path) -> None:
    (pipeline / "transformer" / WEIGHTS).rename(pipeline / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle checkpoint can run code when loaded and is refused"):
        check_pipeline(pipeline)


def test_another_pipeline_class_is_named(pipeline: Path) -> None:
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ModelError, match="_class_name is 'StableDiffusionPipeline', expected WanPipeline"):
        check_pipeline(pipeline)


def test_weights_of_another_model_are_refused(pipeline: Path) -> None:
    path = pipeline / "transformer" / WEIGHTS
    tensors = load_file(str(path))
    del tensors["proj_out.bias"]
    save_file(tensors, str(path), metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing keys, first proj_out\.bias; the weights do not belong"):
        load_transformer(pipeline / "transformer")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            {"transformer_2": PART},
            "transformer_2 is given without boundary_ratio, so the stock pipeline would",
        ),
        ({"transformer": [None, None], "transformer_2": PART, "boundary_ratio": 0.9}, "the low-noise expert alone"),
        ({"boundary_ratio": 0.9}, r"boundary_ratio is 0\.9 without a transformer_2 for the timesteps below"),
        ({"transformer_2": PART, "boundary_ratio": 1.5}, r"boundary_ratio is 1\.5, expected a number between 0 and 1"),
        (
            {"transformer_2": PART, "boundary_ratio": 0.9},
            "transformer_2: no such folder; model_index",
        ),
    ],
)
def test_experts_that_the_stock_pipeline_would_miss(pipeline: Path, index: dict[str, Any], message: str) -> None:
    path = pipeline / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(ModelError, match=message):
        check_pipeline(pipeline)
