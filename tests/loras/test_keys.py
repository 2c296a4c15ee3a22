"""LoRA keys renumbered for a model without some of its blocks."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flcompress.errors import RequestError
from flcompress.loras.keys import remap
from flcompress.loras.names import PrunedModel
from flcompress.loras.peft_settings import remap_settings
from flcompress.models.families.wan import ORIGINAL as WAN

Shapes = dict[str, tuple[int, ...]]


def shapes(blocks: int, single: int = 2) -> Shapes:
    made: Shapes = {"proj_out.weight": (4, 8), "proj_out.bias": (4,), "patch_embedding.weight": (8, 4, 1, 2, 2)}
    for index in range(blocks):
        made |= {f"blocks.{index}.attn1.to_q.weight": (8, 8), f"blocks.{index}.attn1.to_q.bias": (8,)}
        made |= {f"blocks.{index}.ffn.net.0.proj.weight": (32, 8), f"blocks.{index}.scale_shift_table": (1, 6, 8)}
    return made | {f"single_blocks.{index}.attn.to_q.weight": (8, 8) for index in range(single)}


KEPT = {"blocks.0": "blocks.0", "blocks.1": "blocks.3", "single_blocks.0": "single_blocks.1"}
CUT = PrunedModel(name="Cut", shapes=shapes(2, 1), kept=KEPT, before=shapes(4), original=WAN)
ALONE = PrunedModel(name="Cut", shapes=shapes(2, 1), kept=KEPT, original=WAN)


UNREAD = (
    "names of diffusers, PEFT and kohya are read, and of its own project's code; convert the names, or give a LoRA of "
    "this model"
)


def pair(module: str, weight: tuple[int, ...] = (8, 8), down: str = "lora_A", up: str = "lora_B") -> Shapes:
    return {f"{module}.{down}.weight": (2, *weight[1:]), f"{module}.{up}.weight": (weight[0], 2)}


@pytest.mark.parametrize("model", [CUT, ALONE])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("transformer.blocks.3.attn1.to_q.lora_A.weight", "transformer.blocks.1.attn1.to_q.lora_A.weight"),
        ("blocks.3.attn1.to_q.lora_down.weight", "blocks.1.attn1.to_q.lora_down.weight"),
        ("blocks.3.attn1.to_q.lora.down.weight", "blocks.1.attn1.to_q.lora.down.weight"),
        ("base_model.model.blocks.3.attn1.to_q.lora_A.weight", "base_model.model.blocks.1.attn1.to_q.lora_A.weight"),
        ("blocks.3.attn1.to_q.lora_A.default.weight", "blocks.1.attn1.to_q.lora_A.default.weight"),
        ("diffusion_model.blocks.3.self_attn.q.lora_A.weight", "diffusion_model.blocks.1.self_attn.q.lora_A.weight"),
        ("lora_unet_blocks_3_self_attn_q.lora_down.weight", "lora_unet_blocks_1_self_attn_q.lora_down.weight"),
        ("lora_unet_blocks_3_attn1_to_q.lora_down.weight", "lora_unet_blocks_1_attn1_to_q.lora_down.weight"),
        ("pipe.dit.blocks.3.self_attn.q.lora_A.default.weight", "pipe.dit.blocks.1.self_attn.q.lora_A.default.weight"),
        ("model.diffusion_model.blocks.3.ffn.0.lora_A.weight", "model.diffusion_model.blocks.1.ffn.0.lora_A.weight"),
        ("lycoris_blocks_3_attn1_to_q.lora_down.weight", "lycoris_blocks_1_attn1_to_q.lora_down.weight"),
        (
            "lora_transformer_blocks_3_attn1_to_q.lora_down.weight",
            "lora_transformer_blocks_1_attn1_to_q.lora_down.weight",
        ),
        ("single_blocks.1.attn.to_q.lora_A.weight", "single_blocks.0.attn.to_q.lora_A.weight"),
        ("transformer.single_blocks.1.attn.to_q.lora_A.weight", "transformer.single_blocks.0.attn.to_q.lora_A.weight"),
        ("blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_A.weight"),
        ("proj_out.lora_A.weight", "proj_out.lora_A.weight"),
        ("diffusion_model.head.head.lora_A.weight", "diffusion_model.head.head.lora_A.weight"),
    ],
)
def test_every_style_keeps_its_style(before: str, after: str, model: PrunedModel) -> None:
    done = remap({before: (8, 2) if "lora_up" in before else (2, 8)}, model)
    assert done.keys == {before: after}
    assert (len(done.modules), done.renumbered, done.dropped) == (1, int(before != after), {})


def test_what_goes_with_a_module_goes_with_it() -> None:
    module = "blocks.3.attn1.to_q"
    lora = pair(module) | {f"{module}.alpha": (), f"{module}.dora_scale": (8, 1), f"{module}.diff_b": (8,)}
    lora |= {"blocks.3.modulation.diff": (1, 6, 8), "patch_embedding.lora_A.weight": (2, 4, 1, 2, 2)}
    lora |= {"patch_embedding.lora_B.weight": (8, 2, 1, 1, 1), "text_encoder.layers.3.q.lora_A.weight": (2, 99)}
    done = remap(lora, CUT)
    assert set(done.keys) == set(lora)
    assert all(new == old.replace("blocks.3", "blocks.1") for old, new in done.keys.items())
    assert (len(done.modules), done.renumbered) == (3, 2)


OTHER_KINDS: dict[str, Shapes] = {
    "LoHa": {"hada_w1_a": (32, 2), "hada_w1_b": (2, 8), "hada_w2_a": (32, 2), "hada_w2_b": (2, 8), "alpha": ()},
    "LoKr": {"lokr_w1": (4, 2), "lokr_w2": (8, 4), "scalar": ()},
    "LoKr in products": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 2), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 4)},
    "DoRA by rows": {"lora_down.weight": (2, 8), "lora_up.weight": (32, 2), "dora_scale": (32, 1)},
    "DoRA by columns": {"lora_down.weight": (2, 8), "lora_up.weight": (32, 2), "dora_scale": (1, 8)},
    "PEFT's DoRA": {"lora_A.weight": (2, 8), "lora_B.weight": (32, 2), "lora_magnitude_vector": (32,)},
    "values": {"set_weight": (32, 8), "reshape_weight": (2,), "diff_b": (32,)},
    "norms": {"w_norm": (32, 8), "b_norm": (32,)},
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("module", ["blocks.{}.ffn.net.0.proj", "lycoris_blocks_{}_ffn_net_0_proj"])
def test_other_kinds_follow(kind: str, module: str) -> None:
    lora = {f"{module.format(3)}.{name}": shape for name, shape in OTHER_KINDS[kind].items()}
    lora |= {f"{module.format(2)}.{name}": shape for name, shape in OTHER_KINDS[kind].items()}
    done = remap(lora, CUT)
    assert done.keys == {f"{module.format(3)}.{name}": f"{module.format(1)}.{name}" for name in OTHER_KINDS[kind]}
    assert done.dropped == {"blocks.2": ("ffn.net.0.proj",)}


def test_a_blocks_own_parameter() -> None:
    """ComfyUI's `diff_m` of a block is the difference of its modulation; the head's stays."""
    done = remap({"diffusion_model.blocks.3.diff_m": (1, 6, 8), "diffusion_model.blocks.1.diff_m": (1, 6, 8)}, CUT)
    assert done.keys == {"diffusion_model.blocks.3.diff_m": "diffusion_model.blocks.1.diff_m"}
    assert done.dropped == {"blocks.1": ("modulation",)}


def test_convolutions_with_a_tensor_between() -> None:
    module = "patch_embedding"
    down, between, up = (2, 4, 1, 1, 1), (2, 2, 1, 2, 2), (8, 2, 1, 1, 1)
    lora = {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.lora_mid.weight": between}
    assert set(remap(lora, CUT).keys) == set(lora)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"hada_w1_a": (16, 2)}, "expected one side of 32 for a weight [32, 8]"),
        ({"hada_w2_b": (2, 16)}, "expected one side of 8 for a weight [32, 8]"),
        ({"lokr_w1": (5, 2)}, "its rows do not make 32 for a weight [32, 8]"),
        ({"lokr_w1": (4, 2), "lokr_w2": (4, 4)}, "its rows do not make 32 for a weight [32, 8]"),
        ({"lokr_w1": (4, 2), "lokr_w2": (8, 8)}, "its columns do not make 8 for a weight [32, 8]"),
        ({"dora_scale": (7, 1)}, "expected one for each of 32 rows"),
        ({"set_weight": (8, 8)}, "expected [32, 8]"),
        ({"diff_b": (8,)}, "expected [32]"),
        ({"alpha": (3,)}, "expected []"),
    ],
)
def test_other_kinds_of_another_model(wrong: Shapes, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        remap({f"blocks.3.ffn.net.0.proj.{name}": shape for name, shape in wrong.items()}, CUT)
    assert str(caught.value).endswith(f"{told}; this LoRA is for another model")


@pytest.mark.parametrize("kind", ["oft_blocks", "boft_b", "ia3_l", "vera_lambda_b", "a1.weight", "on_input"])
def test_kinds_that_are_not_read_are_named(kind: str) -> None:
    key = f"blocks.3.attn1.to_q.{kind}"
    with pytest.raises(RequestError, match="no tensor of a LoRA, LoHa or LoKr that is read") as caught:
        remap({key: (8, 8)}, CUT)
    assert str(caught.value).startswith(key)


def test_what_a_pruned_block_has_in_another_form_is_dropped() -> None:
    """A new last block can be of another kind: its layer is cut in rows, or gone."""
    now = {**shapes(2, 1), "blocks.1.ffn.net.0.proj.weight": (16, 8)}
    del now["blocks.1.attn1.to_q.weight"]
    model = PrunedModel(name="Cut", shapes=now, kept=KEPT, before=shapes(4))
    lora = pair("blocks.3.ffn.net.0.proj", (32, 8)) | pair("blocks.3.attn1.to_q") | pair("blocks.0.attn1.to_q")
    done = remap(lora, model)
    assert done.dropped == {"blocks.3": ("attn1.to_q", "ffn.net.0.proj")}
    assert list(done.keys) == list(pair("blocks.0.attn1.to_q"))


@pytest.mark.parametrize("model", [CUT, ALONE])
def test_removed_blocks_are_told(model: PrunedModel) -> None:
    lora = pair("blocks.0.attn1.to_q") | pair("blocks.2.attn1.to_q") | pair("blocks.1.ffn.net.0.proj", (32, 8))
    lora |= pair("blocks.2.ffn.net.0.proj", (32, 8)) | pair("single_blocks.0.attn.to_q")
    done = remap(lora, model)
    assert done.dropped == {
        "blocks.1": ("ffn.net.0.proj",),
        "blocks.2": ("attn1.to_q", "ffn.net.0.proj"),
        "single_blocks.0": ("attn.to_q",),
    }
    assert list(done.keys.values()) == list(pair("blocks.0.attn1.to_q"))


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (
            pair("blocks.3.attn9.to_q"),
            "blocks.3.attn9.to_q.lora_A.weight: Cut has no module 'blocks.3.attn9.to_q' by this name; " + UNREAD,
        ),
        (
            pair("transformer_blocks.0.attn.to_q"),
            "transformer_blocks.0.attn.to_q.lora_A.weight: Cut has no module 'transformer_blocks.0.attn.to_q' by this "
            "name; " + UNREAD,
        ),
        (
            pair("blocks.7.attn1.to_q"),
            "blocks.7.attn1.to_q.lora_A.weight: Cut has no module 'blocks.7.attn1.to_q' by this name; " + UNREAD,
        ),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": (2, 16)},
            "blocks.0.attn1.to_q.lora_A.weight: has shape [2, 16], expected [rank, 8] for a weight [8, 8]; "
            "this LoRA is for another model",
        ),
        (
            {"blocks.2.attn1.to_q.lora_B.weight": (16, 2)},
            "blocks.2.attn1.to_q.lora_B.weight: has shape [16, 2], expected [8, rank] for a weight [8, 8]; "
            "this LoRA is for another model",
        ),
        (
            {"blocks.0.attn1.to_q.lora_A.weight": (2, 8), "blocks.0.attn1.to_q.lora_B.weight": (8, 3)},
            "blocks.0.attn1.to_q.lora_B.weight: has shape [8, 3], its other half has rank 2; "
            "this LoRA is for another model",
        ),
        (
            {"blocks.0.attn1.to_q.weight": (8, 8)},
            "blocks.0.attn1.to_q.weight: no tensor of a LoRA, LoHa or LoKr that is read; expected names such as "
            "blocks.0.attn1.to_q.lora_A.weight; merge another kind of adapter into the model before it is compressed",
        ),
        (
            pair("blocks.1.attn1.to_q") | pair("blocks.2.attn1.to_q") | pair("blocks.2.ffn.net.0.proj", (32, 8)),
            "all 3 modules of this LoRA are in blocks that were removed (blocks.1, blocks.2); nothing of it is left",
        ),
        (
            {"text_encoder.layers.0.q.lora_A.weight": (2, 8)},
            "no tensor of this file is for the transformer; expected a LoRA of the uncut model",
        ),
        ({}, "no tensor of this file is for the transformer; expected a LoRA of the uncut model"),
    ],
)
def test_another_model_is_refused(lora: Shapes, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        remap(lora, CUT)
    assert str(caught.value) == told
    assert caught.value.exit_status == 2


@given(st.sets(st.integers(0, 11), min_size=1))
def test_kept_blocks_close_their_ranks(kept: set[int]) -> None:
    order = sorted(kept)
    names = {f"blocks.{new}": f"blocks.{old}" for new, old in enumerate(order)}
    model = PrunedModel(name="Cut", shapes=shapes(len(order), 0), kept=names, before=shapes(12, 0))
    lora = {key: shape for index in range(12) for key, shape in pair(f"blocks.{index}.attn1.to_q").items()}
    done = remap(lora, model)
    new = {name: key for key, name in done.keys.items()}
    assert list(new) == [key for index in range(len(order)) for key in pair(f"blocks.{index}.attn1.to_q")]
    assert [int(key.split(".")[1]) for key in new.values()] == [index for index in order for _ in range(2)]
    assert set(done.dropped) == {f"blocks.{index}" for index in set(range(12)) - kept}


MODULES = {"blocks.0.attn1.to_q": "blocks.0.attn1.to_q", "blocks.3.attn1.to_q": "blocks.1.attn1.to_q", "out": "out"}


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(
    ("settings", "after"),
    [
        ({"target_modules": ["out", "to_q"]}, {"target_modules": ["out", "to_q"]}),
        (
            {"target_modules": ["blocks.0.attn1.to_q", "blocks.2.attn1.to_q", "blocks.3.attn1.to_q"]},
            {"target_modules": ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q"]},
        ),
        ({"target_modules": r"(blocks\.[0123]\.attn1\.to_q|out)"}, {"target_modules": sorted(MODULES.values())}),
        (
            {"target_modules": ["to_q"], "layers_to_transform": [2, 3], "layers_pattern": "blocks"},
            {"target_modules": sorted(MODULES.values()), "layers_to_transform": None, "layers_pattern": None},
        ),
        (
            {"target_modules": ["to_q"], "exclude_modules": r"blocks\.1\..*"},
            {"target_modules": sorted(MODULES.values()), "exclude_modules": None},
        ),
        (
            {"rank_pattern": {"blocks.3.attn1.to_q": 2, "blocks.2.attn1.to_q": 8}, "alpha_pattern": {"to_[qk]": 3}},
            {
                "rank_pattern": {"blocks.1.attn1.to_q": 2},
                "alpha_pattern": {"blocks.0.attn1.to_q": 3, "blocks.1.attn1.to_q": 3},
            },
        ),
        ({"r": 4, "rank_pattern": {}, "layers_to_transform": None}, {}),
    ],
)
def test_settings_beside_the_weights_follow(prefix: str, settings: dict[str, object], after: dict[str, object]) -> None:
    given, expected = ({prefix + key: one for key, one in made.items()} for made in (settings, settings | after))
    more = {"text_encoder.target_modules": "q|k"}
    assert json.loads(remap_settings(json.dumps(given | more), MODULES)) == expected | more


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "lora_adapter_metadata: '{' given, expected a JSON object; save the LoRA again"),
        ('{"rank_pattern": {"to_(q": 2}}',
         "lora_adapter_metadata: 'to_(q' given, expected a regular expression; save the LoRA again"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_read(text: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        remap_settings(text, MODULES)
    assert str(caught.value) == told


def test_the_second_expert_is_another_model() -> None:
    key = "transformer_2.blocks.3.attn1.to_q.lora_A.weight"
    with pytest.raises(RequestError) as caught:
        remap({key: (2, 8)}, CUT)
    assert str(caught.value) == (
        f"{key}: of the second transformer of a model of two experts (Wan 2.2 A14B), but the pruned Cut is alone; "
        "give the LoRA of its own expert"
    )
