"""LoRAs made for a model, renumbered for the same model without some of its blocks: names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flcompress.errors import RequestError
from flcompress.models.lora_names import Modules, Place, PrunedModel, Shape, plain, renamed

_ENDING = re.compile(
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.[\w-]+)?\.(?P<what>weight|bias)$"
    r"|\.(?P<other>alpha|diff|diff_b|dora_scale|lora_magnitude_vector(\.[\w-]+)?(\.weight)?)$"
)
_SECOND = "transformer_2."
_ELSEWHERE = ("text_encoder", "lora_te")
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


def remap(lora: Mapping[str, Shape], model: PrunedModel) -> Remapped:
    """The keys of a LoRA for the uncut model, renamed for the cut one.

    Args:
        lora: shapes of the LoRA's tensors, by key.
        model: what it is to fit.

    Raises:
        RequestError: no LoRA, one for another model, or one that is for removed blocks alone.
    """
    known = Modules(model)
    keys: dict[str, str] = {}
    kept: dict[str, Place] = {}
    places: dict[str, tuple[str, Place]] = {}
    gone: dict[str, dict[str, None]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for key, shape in lora.items():
        if key.startswith(_ELSEWHERE):
            keys[key] = key
            continue
        if key.startswith(_SECOND):
            raise RequestError(
                f"{key}: of the second transformer of a model of two experts (Wan 2.2 A14B), but the pruned "
                f"{model.name} is alone; give the LoRA of its own expert"
            )
        ending = _ENDING.search(key)
        if ending is None:
            raise RequestError(f"{key}: no tensor of a LoRA; expected names such as blocks.0.attn1.to_q.lora_A.weight")
        module = key[: ending.start()]
        place = known.place(module)
        weights = known.shapes(place)
        if not weights:
            where = f"'{place.block}.{place.rest}'" if place.stack else f"'{place.rest}'"
            raise RequestError(f"{key}: {model.name} has no module {where}; this LoRA is for another model")
        wrong = {weight: _misfit(ending, shape, weight, ranks.setdefault(module, {})) for weight in weights}
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
        keys=keys,
        dropped={block: tuple(sorted(gone[block])) for block in sorted(gone, key=_numbered)},
        modules={plain(old): plain(renamed(old, place, known.new)) for old, place in kept.items()},
        renumbered=sum(bool(one.stack) and known.new[one.block] != one.block for one in kept.values()),
    )


def _misfit(ending: re.Match[str], shape: Shape, weight: Shape, ranks: dict[str, int]) -> str:
    """What is wrong with a tensor of a LoRA for a weight [out, in, ...]; nothing where it fits."""
    part, other = ending["part"], ending["other"]
    if part is None:
        expected = {"alpha": (), "diff": weight, "diff_b": weight[:1]}.get(other, shape)
        return "" if shape == expected or (other == "alpha" and shape == (1,)) else f"expected {list(expected)}"
    down = part in ("lora_A", "lora_down", "lora.down")
    if ending["what"] == "bias":
        return "" if shape == weight[:1] else f"expected {list(weight[:1])}"
    if len(shape) != len(weight) or (shape[1:] != weight[1:] if down else shape[0] != weight[0]):
        wanted = ["rank", *weight[1:]] if down else [weight[0], "rank", *([1] * (len(weight) - 2))]
        return f"expected [{', '.join(map(str, wanted))}] for a weight {list(weight)}"
    rank = ranks.setdefault("rank", shape[0] if down else shape[1])
    return "" if rank == (shape[0] if down else shape[1]) else f"its other half has rank {rank}"


def _numbered(block: str) -> tuple[str, int]:
    stack, _, index = block.rpartition(".")
    return stack, int(index)
