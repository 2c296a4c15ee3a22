"""Where a configuration is found, and what is said of one that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from flcompress.errors import ModelError
from flcompress.models.configs import check_config
from flcompress.models.loading import meta_transformer
from flcompress.models.source import find_source

WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.33.0",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
}


def written(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def refused(model: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        meta_transformer(find_source(str(model)).config)
    assert caught.value.exit_status == 2
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_folder_a_file_and_a_pipeline_are_found(tmp_path: Path) -> None:
    config = written(tmp_path / "p" / "transformer" / "config.json", WAN)
    index = {"_class_name": "WanPipeline", "vae": ["diffusers", "AutoencoderKLWan"]}
    index |= {"transformer": ["diffusers", WAN["_class_name"]], "transformer_2": ["diffusers", WAN["_class_name"]]}
    written(tmp_path / "p" / "model_index.json", index)
    for given in (tmp_path / "p", tmp_path / "p" / "transformer", config):
        assert find_source(str(given)).config == config
    assert find_source(str(tmp_path / "p")).others == ("transformer_2",)
    assert len(meta_transformer(config).blocks) == 3


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    told = "no model folder; expected model_index.json (a diffusers pipeline) or config.json (a transformer) in it"
    assert refused(tmp_path / "empty") == f"{tmp_path / 'empty'}: {told}"
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: no such file or folder, and no Hub id (OWNER/NAME)"
    weights = tmp_path / "x.safetensors"
    weights.touch()
    assert refused(weights) == f"{weights}: a .safetensors file; expected a model folder or a config.json"
    index = written(
        tmp_path / "m" / "model_index.json",
        {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
    )
    config = index.parent / "transformer" / "config.json"
    assert refused(index.parent) == f"{config}: no such file; model_index.json of a WanPipeline names its folder"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("UNet2DConditionModel", "UNet2DConditionModel is a U-Net; only diffusion transformers are handled"),
        ("AutoencoderKLWan", "AutoencoderKLWan is no diffusion transformer; only those are handled"),
        (None, "names no _class_name; expected a diffusers transformer such as WanTransformer3DModel"),
    ],
)
def test_another_kind_of_model(tmp_path: Path, name: str | None, told: str) -> None:
    path = written(tmp_path / "config.json", {"_class_name": name})
    assert refused(tmp_path) == f"{path}: {told}"


def test_an_unknown_class_names_the_nearest(tmp_path: Path) -> None:
    written(tmp_path / "config.json", WAN | {"_class_name": "WanTransformer4DModel"})
    assert "_class_name 'WanTransformer4DModel' is no transformer of diffusers" in refused(tmp_path)
    assert "nearest: WanTransformer3DModel, " in refused(tmp_path)


def test_a_pipeline_around_a_unet(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    path = written(tmp_path / "model_index.json", index)
    told = "the unet of a StableDiffusionPipeline is a U-Net (UNet2DConditionModel); only transformers are handled"
    assert refused(tmp_path) == f"{path}: {told}"


def test_a_pipeline_without_a_transformer(tmp_path: Path) -> None:
    path = written(tmp_path / "model_index.json", {"_class_name": "OddPipeline", "vae": ["diffusers", "AutoencoderKL"]})
    told = "a OddPipeline has no diffusion transformer, only vae (AutoencoderKL); only transformers are handled"
    assert refused(tmp_path) == f"{path}: {told}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_layers": ...}, "lacks 'num_layers', which decides the size of a WanTransformer3DModel; copy it again"),
        ({"num_layers": -1}, "num_layers is -1, expected a whole number from 0 to 1,000"),
        ({"num_layers": "many"}, "num_layers is 'many', expected a whole number from 0 to 1,000"),
        ({"num_layers": True}, "num_layers is True, expected a whole number from 0 to 1,000"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, expected a whole number from 0 to 1,000"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected a whole number from 1 to 1,000,000"),
        ({"ffn_dim": "wide"}, "ffn_dim is 'wide', expected a whole number"),
        ({"cross_attn_norm": 3}, "cross_attn_norm is 3, expected true or false"),
        ({"eps": "small"}, "eps is 'small', expected a number"),
        ({"patch_size": "big"}, "patch_size is 'big', expected a list"),
        (
            {"num_layers": ..., "num_layer": 3},
            "WanTransformer3DModel has no setting 'num_layer'; did you mean 'num_layers'?",
        ),
        (
            {"ffn_dim": ..., "fnn_dim": 3},
            "WanTransformer3DModel has no setting 'fnn_dim'; did you mean 'ffn_dim'?",
        ),
    ],
)
def test_values_that_cannot_be_meant(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    config = {key: value for key, value in (WAN | changes).items() if value is not ...}
    path = written(tmp_path / "config.json", config)
    assert refused(tmp_path) == f"{path}: {told}"


def test_values_that_build_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "config.json", WAN | {"ffn_dim": -5})
    told = f"{path}: no WanTransformer3DModel can be built from these values (RuntimeError: "
    assert refused(tmp_path).startswith(told)
    assert refused(tmp_path).endswith("); fix them")


def test_what_older_files_lack_or_have_too_much_is_let_be() -> None:
    old = {key: WAN[key] for key in WAN if key != "freq_dim"} | {"pooled_projection_dim": 768}
    assert check_config(old, Path("x")).__name__ == WAN["_class_name"]


def test_a_hub_id_without_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    mend = (
        "where there is a network, give hf download some/model --include '*.json' --local-dir FOLDER, "
        "and here the path of that folder"
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked: list[str] = []  # over the network: the Hub's client alone would try for more than 20 seconds
    stock = huggingface_hub.hf_hub_download

    def download(model: str, name: str, **given: Any) -> str:
        if not given["local_files_only"]:
            asked.append(name)
        return str(stock(model, name, **given))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    told = "some/model: no such folder here, not downloaded before, and http://127.0.0.1:9 cannot be reached"
    assert refused("some/model") == f"{told}; {mend}"
    assert asked == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (
        refused("some/model")
        == f"some/model: no such folder here, not downloaded before, and HF_HUB_OFFLINE is set; {mend}"
    )


def test_of_the_hub_only_configurations_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "transformer" / "config.json", WAN)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", WAN["_class_name"]]}
    written(tmp_path / "model_index.json", index)
    asked: list[str] = []

    def download(model: str, name: str, **_: Any) -> str:
        asked.append(f"{model}/{name}")
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("flcompress.models.source._reachable", lambda endpoint: True)
    assert find_source("some/model").config == tmp_path / "transformer" / "config.json"
    assert asked == ["some/model/model_index.json", "some/model/transformer/config.json"]
