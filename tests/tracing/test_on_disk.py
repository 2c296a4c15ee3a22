"""Blocks removed from a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel

from flcompress.errors import ModelError, NotRemovable, RequestError
from flcompress.models.inputs import example_inputs
from flcompress.models.shards import folder_tensors
from flcompress.tracing.config_keys import build
from flcompress.tracing.removal.on_disk import remove_on_disk
from flcompress.tracing.removal.remove import remove
from flcompress.tracing.removal.stand_in import stand_in
from flcompress.tracing.skip import skip

pytestmark = pytest.mark.e2e

GONE = ("blocks.1", "blocks.2")


def wan(**changes: Any) -> Any:
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 300,
        "freq_dim": 16, "ffn_dim": 400, "num_layers": 4, "rope_max_seq_len": 32,
    }  # fmt: skip
    model = WanTransformer3DModel(**{**settings, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    wan().save_pretrained(str(tmp_path / "model"), max_shard_size="400KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    return tmp_path / "model"


@pytest.mark.parametrize("own_weights", [10**9, 0])
def test_stock_diffusers_loads_what_skipping_does(folder: Path, tmp_path: Path, own_weights: int) -> None:
    target = tmp_path / "small"
    done = remove_on_disk(folder, GONE, target, own_weights=own_weights, largest_shard=300_000)
    assert (done.stand_in is None) == (own_weights > 0)
    assert done.certificate.max_abs_difference == done.certificate.random_max_abs_difference == 0.0
    assert done.certificate.kept == {"blocks.0": "blocks.0", "blocks.3": "blocks.1"}

    model = WanTransformer3DModel.from_pretrained(str(folder)).eval()
    small, info = WanTransformer3DModel.from_pretrained(str(target), output_loading_info=True)
    assert not any(info.values())
    assert len(list(target.glob("*.safetensors"))) > 1
    inputs = example_inputs(model)
    # Fresh memory: kernels round differently on weights that lie unaligned in a mapped file.
    model, small = (network.float().apply(_fresh) for network in (model, small.eval()))
    with torch.no_grad(), skip(model, GONE):
        expected = model(**inputs).sample
    with torch.no_grad():
        assert torch.equal(small(**inputs).sample, expected)
    assert not list(tmp_path.glob(".*"))


def _fresh(module: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_tensors_keep_every_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    model = wan().to(dtype)
    model.save_pretrained(str(tmp_path / "model"))
    done = remove_on_disk(tmp_path / "model", GONE, tmp_path / "small", own_weights=0)
    stored, written = folder_tensors(tmp_path / "model"), folder_tensors(tmp_path / "small")
    assert set(done.names) == set(written)
    for new, old in done.names.items():
        assert old == new.replace("blocks.1.", "blocks.3.")
        assert (written[new].dtype, written[new].shape) == (stored[old].dtype, stored[old].shape)
        assert b"".join(written[new].pieces()) == b"".join(stored[old].pieces())
    assert {tensor.dtype for tensor in written.values()} == {"F32" if dtype == torch.float32 else "BF16"}


def test_it_is_what_removal_in_memory_gives(folder: Path, tmp_path: Path) -> None:
    model = WanTransformer3DModel.from_pretrained(str(folder))
    remove(model, ["blocks.3"], example_inputs(model)).save_pretrained(str(tmp_path / "memory"))  # type: ignore[operator]
    remove_on_disk(folder, ["blocks.3"], tmp_path / "disk", own_weights=0)
    in_memory, on_disk = (WanTransformer3DModel.from_pretrained(str(tmp_path / name)) for name in ("memory", "disk"))
    assert {k: v for k, v in in_memory.config.items() if k[0] != "_"} == {
        k: v for k, v in on_disk.config.items() if k[0] != "_"
    }
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, on_disk.state_dict()[name])


def test_a_stand_in_is_narrow_and_as_deep() -> None:
    with torch.device("meta"):
        large = wan()
    small, changed = stand_in(large)
    assert changed == {"num_attention_heads": (4, 2), "text_dim": (300, 128), "ffn_dim": (400, 128)}
    assert len(small.blocks) == 4  # type: ignore[arg-type]
    values = [tensor.reshape(-1)[:4].tolist() for tensor in small.parameters()]
    assert len({tuple(value) for value in values}) == len(values)


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    for given, message in (
        ('"num_layers": 5', r"\d+ missing keys, first blocks\.4\..*; the weights do not belong to this config\.json"),
        (
            '"num_layers": 3',
            r"\d+ unexpected keys, first blocks\.3\..*; the weights do not belong to this config\.json",
        ),
    ):
        text = config.read_text()
        config.write_text(text.replace('"num_layers": 4', given))
        with pytest.raises(ModelError, match=message):
            remove_on_disk(folder, GONE, tmp_path / "small")
        config.write_text(text)
    config.write_text(config.read_text().replace('"ffn_dim": 400', '"ffn_dim": 401'))
    with pytest.raises(
        ModelError, match=r"has shape \[400(, 96)?\], expected \[401(, 96)?\]; the weights do not belong"
    ):
        remove_on_disk(folder, GONE, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_nothing_is_written_without_a_certificate(folder: Path, tmp_path: Path) -> None:
    for paths in (["blocks.9"], [], [f"blocks.{index}" for index in range(4)]):
        with pytest.raises((RequestError, NotRemovable)):
            remove_on_disk(folder, paths, tmp_path / "small", own_weights=0)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_learned_positions_keep_their_size(tmp_path: Path) -> None:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=8, out_channels=4, text_embed_dim=300,
        time_embed_dim=16, sample_height=10, sample_width=12, sample_frames=17, max_text_seq_length=20,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    model.save_pretrained(str(tmp_path / "model"))
    done = remove_on_disk(tmp_path / "model", ["transformer_blocks.1"], tmp_path / "small", own_weights=0)
    assert done.stand_in is not None
    assert done.stand_in["sample_height"] == (10, 8)
    small, info = CogVideoXTransformer3DModel.from_pretrained(str(tmp_path / "small"), output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(small.patch_embed.pos_embedding, model.patch_embed.pos_embedding)
    assert small.config.sample_height == 10


def test_a_stand_in_that_stays_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        large = wan()
    narrowest = sum(parameter.numel() for parameter in stand_in(large)[0].parameters())
    monkeypatch.setattr("flcompress.tracing.removal.stand_in.LARGEST", 1000)
    with pytest.raises(NotRemovable) as caught:
        stand_in(large)
    assert str(caught.value) == (
        "WanTransformer3DModel: no narrow model of this class and depth can be built to certify removals on: the "
        f"narrowest has {narrowest:,} parameters, expected at most 1,000"
    )


def test_a_setting_that_was_a_default_can_be_changed() -> None:
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=1, attention_head_dim=16)
    assert model.config.num_layers == 30
    assert len(build(model, {"num_layers": 2}).transformer_blocks) == 2  # type: ignore[arg-type]


def test_a_small_model_with_learned_positions_is_tried_at_its_own_size(tmp_path: Path) -> None:
    """As CogVideoX-5b-I2V, whose positions are a table for one size and one length of the prompt."""
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=4, sample_width=6, sample_height=4, sample_frames=9, max_text_seq_length=10,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    inputs = example_inputs(model)
    assert inputs["hidden_states"].shape == (1, 3, 8, 4, 6)
    assert inputs["encoder_hidden_states"].shape == (1, 10, 12)
    model.save_pretrained(str(tmp_path / "model"))
    done = remove_on_disk(tmp_path / "model", ["transformer_blocks.2"], tmp_path / "small")
    assert done.stand_in is None
    assert done.certificate.max_abs_difference == 0.0
