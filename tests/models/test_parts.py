"""Every part of a pipeline is checked as its transformer is, by the rules of stock loading, before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from flcompress.cli import main
from flcompress.errors import ModelError
from flcompress.models.folder import check_pipeline
from flcompress.models.loading import load_transformer, load_vae
from flcompress.models.part_check import check_part
from flcompress.models.parts import load_part, open_parts
from tests.families import encoders
from tests.fixtures.tiny import tiny_pipeline

UMT5 = ("transformers", "UMT5EncoderModel")
QUERY = "encoder.block.0.layer.0.SelfAttention.q.weight"
FILES = {
    "text_encoder": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("parts") / "model", layers=2)


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(folder: Path, how: Callable[[Weights], Any], file: str = "") -> None:
    """Write a part's weights anew, changed in place."""
    path = folder / (file or FILES[folder.name])
    weights = load_file(str(path))
    how(weights)
    save_file(weights, str(path), metadata={"format": "pt"})


def _add(weights: Weights, name: str, value: torch.Tensor) -> None:
    weights[name] = value


def configure(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(pipeline: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_pipeline(pipeline)
    assert "\n" not in str(caught.value)
    return str(caught.value)


MISSING = "{folder}: 1 missing keys, first {name}; the weights do not belong to this config.json"
UNEXPECTED = "{folder}: 1 unexpected keys, first {name}; the weights do not belong to this config.json"
SHAPE = "{folder}/{file}: tensor {name} has shape [3], expected {shape}; the weights do not belong to this config.json"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", QUERY),
        ("text_encoder", "encoder.final_layer_norm.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("vae", "quant_conv.weight"),
        ("transformer", "blocks.1.attn1.to_q.bias"),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_misshaped_is_named(pipeline: Path, part: str, name: str) -> None:
    folder = pipeline / part
    kind = json.loads((pipeline / "model_index.json").read_text())[part]
    before = load_file(str(folder / FILES[part]))[name]
    words = {"folder": folder, "file": FILES[part], "name": name, "shape": list(before.shape)}

    def told(message: str) -> None:
        assert refused(pipeline) == message.format(**words)
        with pytest.raises(ModelError, match="the weights do not belong"):  # and where it is loaded without a check
            load_transformer(folder) if part == "transformer" else load_part(folder, kind)

    change(folder, lambda weights: weights.pop(name))
    told(MISSING)
    change(folder, lambda weights: weights.update({name: torch.zeros(3)}))
    told(SHAPE)
    change(folder, lambda weights: weights.update({name: before, "other.weight": torch.zeros(3)}))
    words["name"] = "other.weight"
    told(UNEXPECTED)


def test_the_second_expert_is_checked_too(pipeline: Path) -> None:
    shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
    second = ["diffusers", "WanTransformer3DModel"]
    configure(pipeline / "model_index.json", transformer_2=second, boundary_ratio=0.9)
    check_pipeline(pipeline)
    change(pipeline / "transformer_2", lambda weights: weights.pop("proj_out.bias"), FILES["transformer"])
    assert "transformer_2: 1 missing keys, first proj_out.bias" in refused(pipeline)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("text_encoder", {"num_layers": 3}, "missing keys, first encoder.block.2."),
        ("text_encoder", {"num_layers": 1}, "unexpected keys, first encoder.block.1."),
        ("text_encoder", {"d_model": 32}, "has shape"),
        ("text_encoder", {"vocab_size": 99}, r"expected [99, "),
        (
            "text_encoder",
            {"model_type": "t5"},
            "model_type is 't5', expected 'umt5', since model_index.json says UMT5Enc",
        ),
        ("text_encoder", {"d_model": "wide"}, "no UMT5EncoderModel can be built from these values ("),
        (
            "text_encoder",
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quantization_config is of bitsand",
        ),
        ("transformer", {"quantization_config": {"quant_method": "torchao"}}, "quantization_config is of torchao"),
        (
            "text_encoder",
            {"transformers_weights": "a.safetensors"},
            "transformers_weights is 'a.safetensors', which is",
        ),
        ("vae", {"base_dim": 16}, "has shape"),
        ("vae", {"num_res_blocks": 2}, "missing keys"),
        (
            "vae",
            {"_class_name": "AutoencoderKL"},
            "_class_name is 'AutoencoderKL', but model_index.json says Autoencod",
        ),
        ("vae", {"dim_mult": "no"}, "no AutoencoderKLWan can be built from these values ("),
        ("transformer", {"num_layers": 3}, "missing keys, first blocks.2."),
    ],
)
def test_a_configuration_of_another_part_is_named(
    pipeline: Path, part: str, values: dict[str, Any], message: str
) -> None:
    configure(pipeline / part / "config.json", **values)
    told = refused(pipeline)
    assert told.startswith(str(pipeline / part))
    assert message in told


def test_every_command_says_it_before_any_work(pipeline: Path, tmp_path: Path) -> None:
    change(pipeline / "text_encoder", lambda weights: weights.pop(QUERY))
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(f"version: 1\nmodel: {pipeline}\nsampling: {{max_sequence_length: 16}}\npasses: []\n")
    message = "error: " + MISSING.format(folder=pipeline / "text_encoder", name=QUERY) + "\n"
    for command in (
        ("apply", recipe, "--run-dir", out),
        ("apply", recipe, "--run-dir", out, "--dry-run"),
        ("plan", recipe),
        ("encode", "--pipeline", pipeline, "--captions", tmp_path / "prompts.txt", "--out", out),
    ):
        done = CliRunner().invoke(main, [str(word) for word in command])
        assert (done.exit_code, done.stderr) == (2, message)
        assert not out.exists()
    exported = tmp_path / "run" / "exports" / "diffusers"
    shutil.copytree(pipeline, exported)
    (exported / "flcompress.json").write_text("{}")
    done = CliRunner().invoke(
        main, ["generate", str(tmp_path / "run"), "--prompt", "x", "--out", str(tmp_path / "a.gif")]
    )
    assert (done.exit_code, done.stderr) == (2, message.replace(str(pipeline), str(exported)))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


def test_what_stock_loading_leaves_out_by_design_is_no_fault(tmp_path: Path) -> None:
    """Tied embeddings that are stored once, and the other half of the model that an encoder was saved from."""
    from transformers import (
        CLIPModel,
        CLIPTextModel,
        T5EncoderModel,
        T5ForConditionalGeneration,
        UMT5EncoderModel,
        UMT5ForConditionalGeneration,
    )

    umt5, t5, clip = (model.config for model in (encoders.umt5(), encoders.t5(), encoders.clip()))
    both = CLIPModel.config_class(text_config=clip.to_dict(), vision_config=encoders.clip_vision().config.to_dict())
    ids = torch.tensor([[3, 4, 1]])
    for number, (model, encoder) in enumerate(
        [
            (UMT5ForConditionalGeneration(umt5), UMT5EncoderModel),
            (T5ForConditionalGeneration(t5), T5EncoderModel),
            (CLIPModel(both), CLIPTextModel),
        ]
    ):
        folder = saved(model.eval(), tmp_path / str(number))
        own = model.text_model if encoder is CLIPTextModel else model.encoder
        loaded = load_part(folder, ("transformers", encoder.__name__))
        torch.testing.assert_close(loaded(ids).last_hidden_state, own(ids).last_hidden_state)
        change(folder, lambda weights: weights.update({"other.weight": torch.zeros(3)}), "model.safetensors")
        with pytest.raises(ModelError, match="unexpected keys"):
            check_part(folder, ("transformers", encoder.__name__))

    folder = saved(encoders.umt5(), tmp_path / "tied")
    expected = load_part(folder, UMT5)(ids).last_hidden_state
    embeddings = load_file(str(folder / "model.safetensors"))["shared.weight"]
    for name in ("encoder.embed_tokens.weight", "shared.weight"):

        def only(weights: Weights, name: str = name) -> None:
            weights.pop("shared.weight", None)
            weights.pop("encoder.embed_tokens.weight", None)
            weights[name] = embeddings

        change(folder, only, "model.safetensors")
        assert torch.equal(load_part(folder, UMT5)(ids).last_hidden_state, expected)
    change(folder, lambda weights: weights.pop("shared.weight"), "model.safetensors")
    with pytest.raises(ModelError, match=r"missing keys, first .*(shared|embed_tokens)\.weight"):
        check_part(folder, UMT5)


def test_old_names_that_stock_loading_converts_are_accepted(tmp_path: Path) -> None:
    """A LLaVA under the names of older releases; an image autoencoder with the attention of early diffusers."""
    from diffusers import AutoencoderKL

    llava = saved(encoders.llava(), tmp_path / "llava")
    assert "language_model.model.embed_tokens.weight" in load_file(str(llava / "model.safetensors"))
    check_part(llava, ("transformers", "LlavaForConditionalGeneration"))
    change(llava, lambda weights: weights.pop("language_model.model.norm.weight"), "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing keys, first .*norm\.weight"):
        check_part(llava, ("transformers", "LlavaForConditionalGeneration"))

    vae = saved(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), tmp_path / "vae")
    expected = load_vae(vae).state_dict()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: Weights) -> None:
        for name in list(weights):
            for new, before in old.items():
                if f".attentions.0.{new}." in name:
                    weights[name.replace(new, before)] = weights.pop(name)

    change(vae, rename)
    found = load_vae(vae).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_class_without_weights_of_its_own_is_named(pipeline: Path) -> None:
    configure(pipeline / "model_index.json", text_encoder=["transformers", "AutoModel"])
    assert "text_encoder is of class AutoModel, expected one with weights of its own" in refused(pipeline)


def test_an_adapter_beside_a_text_encoder_is_named(pipeline: Path) -> None:
    (pipeline / "text_encoder" / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: an adapter, which stock loading adds to the weights only where PEFT" in refused(
        pipeline
    )


def test_quantised_weights_are_named(pipeline: Path) -> None:
    """With a scale beside them, or as whole numbers; fp8 alone is a way to store numbers."""
    for part, name in (("text_encoder", QUERY), ("transformer", "blocks.0.attn1.to_q.weight")):
        folder = pipeline / part
        before = (folder / FILES[part]).read_bytes()
        for scale in (name.replace("weight", "scale_weight"), f"{name}_scale_inv", "scaled_fp8", f"{name}.absmax"):
            change(folder, partial(_add, name=scale, value=torch.ones(1)))
            assert f"tensor {scale} is the scale of quantised weights, which are not read" in refused(pipeline)
            (folder / FILES[part]).write_bytes(before)
        whole = load_file(str(folder / FILES[part]))[name].to(torch.int8)
        change(folder, partial(_add, name=name, value=whole))
        assert f"tensor {name} is stored in I8; quantised weights are not read" in refused(pipeline)
        (folder / FILES[part]).write_bytes(before)


@pytest.mark.parametrize("named", [None, "bfloat16", "float8_e4m3fn"])
def test_fp8_is_taken_as_the_numbers_it_holds(pipeline: Path, named: str | None) -> None:
    def fp8(weights: Weights) -> None:
        weights |= {name: one.to(torch.float8_e4m3fn) for name, one in weights.items() if one.ndim == 2}

    for part in ("text_encoder", "vae", "transformer"):
        change(pipeline / part, fp8)
    configure(pipeline / "text_encoder" / "config.json", dtype=named)
    check_pipeline(pipeline)
    computed = torch.bfloat16 if named == "bfloat16" else torch.float32
    parts = open_parts(pipeline)
    text = load_part(pipeline / "text_encoder", UMT5)
    for part, model in (
        ("text_encoder", text),
        ("vae", parts.vae),
        ("transformer", load_transformer(pipeline / "transformer")),
    ):
        dtype = computed if part == "text_encoder" else torch.float32
        stored = load_file(str(pipeline / part / FILES[part]))
        for name, one in model.state_dict().items():
            if name in stored and stored[name].dtype == torch.float8_e4m3fn:
                assert torch.equal(one, stored[name].to(dtype))
    assert all(one.isfinite().all() for one in parts.encode_prompts(["a red ball"], 16).values())
