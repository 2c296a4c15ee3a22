"""LoRAs under the names of the families' own projects, on stock models."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as stock

from flcompress.loras.keys import remap
from flcompress.loras.names import Modules, PrunedModel, Shape
from flcompress.models.families import family_of, known_families
from tests.zoo import ZOO

CLASSES = sorted({name for family in known_families() if family.original.modules for name in family.transformers})


def shapes_of(name: str) -> list[dict[str, Shape]]:
    """Shapes of the tensors of every zoo model of a class."""
    found = []
    for entry in ZOO.values():
        if entry.model_class == name:
            with torch.device("meta"):
                found.append({key: tuple(one.shape) for key, one in entry.build().state_dict().items()})
    return found


def without_first(name: str, shapes: dict[str, Shape]) -> PrunedModel:
    """A model that has lost the first block of every stack."""
    original = family_of(name).original
    stacks = set(original.stacks.values()) or {"blocks", "transformer_blocks"}
    depth = {
        stack: 1
        + max(int(key.removeprefix(f"{stack}.").split(".")[0]) for key in shapes if key.startswith(f"{stack}."))
        for stack in stacks
        if any(key.startswith(f"{stack}.") for key in shapes)
    }
    kept = {f"{stack}.{n - 1}": f"{stack}.{n}" for stack, count in depth.items() for n in range(1, count)}
    now = {key: shape for key, shape in shapes.items() if not key.startswith(tuple(f"{stack}." for stack in depth))}
    for new, old in kept.items():
        now |= {f"{new}{key.removeprefix(old)}": one for key, one in shapes.items() if key.startswith(f"{old}.")}
    return PrunedModel(name=name, shapes=now, kept=kept, before=shapes, original=original)


def original_lora(model: PrunedModel, before: str, *, flat: bool = False) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on every linear layer that the table has, in all blocks, under the original names."""
    known, made = Modules(model), {}
    spelled = {ours: theirs for theirs, ours in model.original.stacks.items()}
    assert model.before is not None
    blocks = sorted({".".join(key.split(".")[: stack.count(".") + 2]) for stack in set(known.stacks.values())
                     for key in model.before if key.startswith(f"{stack}.")})  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for block in ["", *blocks]:
        stack, _, number = block.rpartition(".")
        for name in model.original.modules:
            if (stack.endswith("refiner_blocks")) != name.startswith(("self_attn_", "mlp.fc", "adaLN_modulation")):
                continue  # tables are one for all stacks; these are the refiner's alone
            module = f"{spelled.get(stack, stack)}.{number}.{name}" if block else name
            shape = next(iter(known.shapes(known.parse(module))), None)
            if (
                shape is None
                or len(shape) != 2
                or "modulation" in name.split(".")[-1:]
                or (not block and "." not in name)
            ):
                continue
            key = before + (module.replace(".", "_") if flat else module)
            down, up = ("lora_down", "lora_up") if flat else ("lora_A", "lora_B")
            made[f"{key}.{down}.weight"] = torch.randn(2, shape[1], generator=draw)
            made[f"{key}.{up}.weight"] = torch.randn(shape[0], 2, generator=draw)
    return made


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_of_a_table_is_a_module_of_the_stock_class(name: str) -> None:
    original = family_of(name).original
    tensors = {key for shapes in shapes_of(name) for key in shapes}
    for stack in original.stacks.values():
        assert any(key.startswith(f"{stack}.0.") for key in tensors), stack
    for theirs, ours in original.modules.items():
        for part in ours.replace(" | ", " + ").split(" + "):
            assert any(key.endswith((f".{part}.weight", f".{part}")) or key == f"{part}.weight" for key in tensors), (
                theirs
            )


# LTX's layers within blocks have the names of the stock class.
@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("LTX")])
@pytest.mark.parametrize(("before", "flat"), [("diffusion_model.", False), ("", False), ("lora_unet_", True)])
def test_blocks_are_renumbered_under_the_original_names(name: str, before: str, flat: bool) -> None:
    (shapes, *_) = shapes_of(name)
    model = without_first(name, shapes)
    lora = original_lora(model, before, flat=flat)
    assert len(lora) > 10
    done = remap({key: tuple(one.shape) for key, one in lora.items()}, model)
    assert done.dropped.keys() == {f"{stack}.0" for stack in {old.rpartition(".")[0] for old in model.kept.values()}}
    assert done.renumbered == sum(1 for key in done.keys if done.keys[key] != key) / 2 > 0
    for old, new in done.keys.items():
        numbers = [[int(part) for part in key.replace(".", "_").split("_") if part.isdigit()] for key in (old, new)]
        if old != new:
            assert [a - b for a, b in zip(*numbers, strict=True)].count(1) == 1


def _sides(*names: str) -> tuple[str, ...]:
    return tuple(f"{side}_{name}" for side in ("img", "txt") for name in names)


# Not `linear1` and `self_attn_qkv`: the converters split them at the width of the release, or in three at any rank.
CONVERTED: dict[str, dict[str, tuple[str, ...]]] = {
    "WanTransformer3DModel": {"blocks": ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")},
    "HunyuanVideoTransformer3DModel": {
        "double_blocks": _sides("attn_qkv", "attn_proj", "mod.linear", "mlp.fc1", "mlp.fc2"),
        "single_blocks": ("linear2", "modulation.linear"),
        "txt_in.individual_token_refiner.blocks": ("self_attn_proj", "adaLN_modulation.1"),
    },
    "FluxTransformer2DModel": {
        "double_blocks": _sides("attn.qkv", "attn.proj", "mod.lin", "mlp.0", "mlp.2"),
        "single_blocks": ("linear2", "modulation.lin"),
    },
}
"""Layers of the original code, by stack."""

CONVERTERS: dict[str, tuple[str, bool, Callable[[Any], Any]]] = {
    "WanTransformer3DModel": ("diffusion_model.", False, stock._convert_non_diffusers_wan_lora_to_diffusers),
    "HunyuanVideoTransformer3DModel": ("", False, stock._convert_hunyuan_video_lora_to_diffusers),
    "FluxTransformer2DModel": ("lora_unet_", True, stock._convert_kohya_flux_lora_to_diffusers),
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_it_is_what_the_stock_converter_makes_of_it(name: str) -> None:
    """Renumbered and then converted by stock diffusers, or converted and then renumbered: the same LoRA."""
    before, flat, convert = CONVERTERS[name]
    shapes = max(shapes_of(name), key=len)
    model = without_first(name, shapes)
    named = re.compile(
        "|".join(f"{stack}.\\d+.{layer}" for stack, layers in CONVERTED[name].items() for layer in layers)
    )
    lora = {
        key: one
        for key, one in original_lora(model, before, flat=flat).items()
        if named.fullmatch(key.removeprefix(before).rpartition(".lora_")[0])
    }
    assert len(lora) >= 12
    done = remap({key: tuple(one.shape) for key, one in lora.items()}, model)
    one_way = convert({new: lora[old].clone() for old, new in done.keys.items()})
    converted = convert(copy.deepcopy(lora))
    again = remap({key: tuple(one.shape) for key, one in converted.items()}, model)
    other_way = {new: converted[old] for old, new in again.keys.items()}
    assert one_way.keys() == other_way.keys()
    for key, one in one_way.items():
        assert torch.equal(one, other_way[key]), key
