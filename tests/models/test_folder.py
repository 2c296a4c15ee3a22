from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flcompress.errors import ModelError
from flcompress.models.folder import check_pipeline
from flcompress.models.loading import load_transformer
from tests.tiny import tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
