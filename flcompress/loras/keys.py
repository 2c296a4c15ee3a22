"""LoRAs made for a model, renumbered for the same model without some of its blocks: names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flcompress.errors import RequestError
from flcompress.loras.kinds import lies_between, misfit, module_of, whole_module_of
from flcompress.loras.names import Modules, Place, PrunedModel, Shape, plain, renamed

_SECOND = "transformer_2."
_ELSEWHERE = ("text_encoder", "lora_te", "clip_l.", "clip_g.", "t5xxl.", "llava.", "conditioner.")
"""What begins so is for another part of the pipeline, which keeps all it has."""


@dataclass(frozen=True, kw_only=True)
class Remapped:
    """Attributes:
    keys: {key in the LoRA: its new key}, for all that is kept.
    dropped: {block of the uncut model: its modules that the LoRA touched and that have no place any more}. The block
        was removed; or it became another kind, such as the last one without a text branch.
    modules: {name: new name} of the transformer's modules that are kept.
    renumbered: those of them whose block has another number now.
    """

    keys: Mapping[str, str]
    dropped: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, str]
    renumbered: int


def remap(lora: Mapping[str, Shape], model: PrunedModel, whole: Collection[str] | None = None) -> Remapped:
    """The keys of a LoRA for the uncut model, renamed for the cut one.

    Args:
        lora: shapes of the LoRA's tensors, by key. LoHa, LoKr and whole differences are read like LoRA.
        model: what it is to fit.
        whole: endings of the modules that are saved as they are beside the adapter, such as "proj_out"; "bias" for
            every bias.

    Raises:
        RequestError: no LoRA, one for another model, or one that is for removed blocks alone.
    """
    known = Modules(model)
    keys: dict[str, str] = {}
    kept: dict[str, Place] = {}
    places: dict[str, tuple[str, Place]] = {}
    gone: dict[str, dict[str, None]] = {}
    others: dict[tuple[str, Shape], dict[str, int]] = {}
    for key in sorted(lora, key=lies_between, reverse=True):
        shape = lora[key]
        if key.startswith(_ELSEWHERE):
            keys[key] = key
            continue
        if key.startswith(_SECOND):
            raise RequestError(
                f"{key}: of the second transformer of a model of two experts (Wan 2.2 A14B), but the pruned "
                f"{model.name} is alone; give the LoRA of its own expert"
            )
        module, kind = _module_of(key, whole or ())
        place = known.place(module)
        weights = known.shapes(place)
        if not weights:
            raise RequestError(_unknown(key, place, model))
        wrong = {weight: misfit(kind, shape, weight, others.setdefault((module, weight), {})) for weight in weights}
        if all(wrong.values()):
            raise RequestError(f"{key}: has shape {list(shape)}, {wrong[weights[0]]}; this LoRA is for another model")
        places[key] = module, place
        if known.shape(place) not in [weight for weight, fault in wrong.items() if not fault]:
            gone.setdefault(place.block, {})[place.rest] = None
    for key, (module, place) in places.items():
        if place.rest not in gone.get(place.block, {}):
            keys[key] = renamed(key, place, known.new)
            kept[module] = place
    if not kept:
        if gone:
            raise RequestError(
                f"all {sum(map(len, gone.values()))} modules of this LoRA are in blocks that were removed "
                f"({', '.join(sorted(gone, key=_numbered))}); nothing of it is left"
            )
        raise RequestError("no tensor of this file is for the transformer; expected a LoRA of the uncut model")
    return Remapped(
        keys={key: keys[key] for key in lora if key in keys},
        dropped={block: tuple(sorted(gone[block])) for block in sorted(gone, key=_numbered)},
        modules={plain(old): plain(renamed(old, place, known.new)) for old, place in kept.items()},
        renumbered=sum(bool(one.stack) and known.new[one.block] != one.block for one in kept.values()),
    )


def _module_of(key: str, whole: Collection[str]) -> tuple[str, str]:
    """(module, kind of tensor); RequestError where the key is of no kind that is read."""
    if found := module_of(key):
        return found
    if found := whole_module_of(key):
        module, kind = found
        if (kind in whole and kind == "bias") or any(f".{plain(module)}".endswith(f".{name}") for name in whole):
            return module, {"weight": "set_weight", "bias": "bias"}[kind]
    raise RequestError(
        f"{key}: no tensor of a LoRA, LoHa or LoKr that is read; expected names such as "
        "blocks.0.attn1.to_q.lora_A.weight; merge another kind of adapter into the model before it is compressed"
    )


def _unknown(key: str, place: Place, model: PrunedModel) -> str:
    where = f"{place.block}.{place.rest}" if place.stack else place.rest
    project = ", and of its own project's code" if model.original.modules else ""
    return (
        f"{key}: {model.name} has no module '{where}' by this name; names of diffusers, PEFT and kohya are read"
        f"{project}; convert the names, or give a LoRA of this model"
    )


def _numbered(block: str) -> tuple[str, int]:
    stack, _, index = block.rpartition(".")
    return stack, int(index)
