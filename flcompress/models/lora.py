"""LoRAs made for a model, renumbered for the same model without some of its blocks: names and shapes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flcompress.errors import RequestError

Shape = tuple[int, ...]

_ENDING = re.compile(
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.[\w-]+)?\.(?P<what>weight|bias)$"
    r"|\.(?P<other>alpha|diff|diff_b|dora_scale|lora_magnitude_vector(\.[\w-]+)?(\.weight)?)$"
)
_PREFIXES = ("base_model.model.", "model.", "transformer.", "diffusion_model.")
_FLAT = "lora_unet_"
"""Before names whose dots are underscores (kohya's style)."""

_ELSEWHERE = ("text_encoder", "lora_te")
"""What begins so is for another part of the pipeline, which keeps all it has."""

_WAN_ORIGINAL = {
    **{f"self_attn.{one}": f"attn1.to_{one}" for one in "qkv"},
    **{f"cross_attn.{one}": f"attn2.to_{one}" for one in "qkv"},
    **{f"self_attn.norm_{one}": f"attn1.norm_{one}" for one in "qk"},
    **{f"cross_attn.norm_{one}": f"attn2.norm_{one}" for one in "qk"},
    **{f"cross_attn.{one}_img": f"attn2.add_{one}_proj" for one in "kv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
}
"""Names of Wan's own code, which many of its LoRAs use -> those of stock diffusers."""


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """What a LoRA is remapped for.

    Attributes:
        name: for messages.
        shapes: of the pruned model's tensors, by name.
        kept: path of a block in it -> path in the model that it was cut from.
        before: shapes of that model's tensors; None where only the pruned model is at hand.
    """

    name: str
    shapes: Mapping[str, Shape]
    kept: Mapping[str, str]
    before: Mapping[str, Shape] | None = None


@dataclass(frozen=True, kw_only=True)
class Remapped:
    """Attributes:
    keys: {key in the LoRA: its new key}, for all that is kept.
    dropped: {removed block: its modules that the LoRA touched}.
    modules: modules of the transformer that are kept.
    renumbered: those of them whose block has another number now.
    """

    keys: Mapping[str, str]
    dropped: Mapping[str, tuple[str, ...]]
    modules: int
    renumbered: int


@dataclass(frozen=True)
class _Place:
    """A module that a key names: `rest` of the block `stack.index`, or of the whole model (no stack)."""

    stack: str
    index: int
    rest: str

    @property
    def block(self) -> str:
        return f"{self.stack}.{self.index}"


@dataclass
class _Model:
    """Lookup of a model's modules by the names that LoRAs use."""

    model: PrunedModel
    new: dict[str, str] = field(init=False)
    stacks: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.new = {old: new for new, old in self.model.kept.items()}
        self.stacks = tuple(sorted({path.rpartition(".")[0] for path in self.new}, key=len, reverse=True))
        blocks = tuple(f"{path}." for path in self.model.kept)
        inside = {name.removeprefix(path) for path in blocks for name in self.model.shapes if name.startswith(path)}
        outside = {name for name in self.model.shapes if not name.startswith(blocks)}
        names = {*map(_owner, inside | outside), *_WAN_ORIGINAL}
        self._flat = {_flat(name): name for name in names}

    def place(self, module: str) -> _Place:
        """Where a module, named as in the uncut model, lies."""
        if module.startswith(_FLAT):
            text = module.removeprefix(_FLAT)
            for stack in self.stacks:
                found = re.match(rf"{re.escape(_flat(stack))}_(\d+)_(.+)$", text)
                if found:
                    return _Place(stack, int(found[1]), self._flat.get(found[2], found[2]))
            return _Place("", -1, self._flat.get(text, text))
        text = _plain(module)
        for stack in self.stacks:
            found = re.match(rf"{re.escape(stack)}\.(\d+)\.(.+)$", text)
            if found:
                return _Place(stack, int(found[1]), found[2])
        return _Place("", -1, text)

    def shape(self, place: _Place) -> Shape | None:
        """Shape of the weight (or of the parameter itself); None where the model, cut or uncut, has no such module."""
        if not place.stack:
            return _weight(self.model.shapes, "", place.rest)
        if place.block in self.new:
            return _weight(self.model.shapes, f"{self.new[place.block]}.", place.rest)
        if self.model.before is not None:
            return _weight(self.model.before, f"{place.block}.", place.rest)
        # The block is gone and so are its shapes: those of its neighbours must do.
        alike = (new for new in self.model.kept if new.rpartition(".")[0] == place.stack)
        shapes = (_weight(self.model.shapes, f"{path}.", place.rest) for path in alike)
        return next((shape for shape in shapes if shape is not None), None)


def remap(lora: Mapping[str, Shape], model: PrunedModel) -> Remapped:
    """The keys of a LoRA for the uncut model, renamed for the cut one.

    Args:
        lora: shapes of the LoRA's tensors, by key.
        model: what it is to fit.

    Raises:
        RequestError: no LoRA, one for another model, or one that is for removed blocks alone.
    """
    known = _Model(model)
    keys: dict[str, str] = {}
    kept: dict[str, _Place] = {}
    gone: dict[str, dict[str, None]] = {}
    ranks: dict[str, dict[str, int]] = {}
    for key, shape in lora.items():
        if key.startswith(_ELSEWHERE):
            keys[key] = key
            continue
        ending = _ENDING.search(key)
        if ending is None:
            raise RequestError(f"{key}: no tensor of a LoRA; expected names such as blocks.0.attn1.to_q.lora_A.weight")
        module = key[: ending.start()]
        place = known.place(module)
        weight = known.shape(place)
        if weight is None:
            where = f"'{place.block}.{place.rest}'" if place.stack else f"'{place.rest}'"
            raise RequestError(f"{key}: {model.name} has no module {where}; this LoRA is for another model")
        wrong = _misfit(ending, shape, weight, ranks.setdefault(module, {}))
        if wrong:
            raise RequestError(f"{key}: has shape {list(shape)}, {wrong}; this LoRA is for another model")
        if place.stack and place.block not in known.new:
            gone.setdefault(place.block, {})[place.rest] = None
            continue
        keys[key] = _renamed(key, place, known.new)
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
        modules=len(kept),
        renumbered=sum(bool(one.stack) and known.new[one.block] != one.block for one in kept.values()),
    )


def remap_settings(text: str, model: PrunedModel) -> str:
    """PEFT's settings, which diffusers keeps as JSON beside a LoRA, with the module names of the cut model."""
    known = _Model(model)

    def one(name: str) -> str | None:
        place = known.place(name)
        if not place.stack:
            return name
        return _renamed(name, place, known.new) if place.block in known.new else None

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {new: walk(inner) for key, inner in value.items() if (new := one(key)) is not None}
        if isinstance(value, list):
            names = [one(item) if isinstance(item, str) else item for item in value]
            return [name for name in names if name is not None]
        return value

    return json.dumps(walk(json.loads(text)), indent=2, sort_keys=True)


def _renamed(key: str, place: _Place, new: Mapping[str, str]) -> str:
    if not place.stack:
        return key
    if key.startswith(_FLAT):
        old = f"{_FLAT}{_flat(place.block)}_"
        return f"{_FLAT}{_flat(new[place.block])}_{key.removeprefix(old)}"
    head, _, rest = key.partition(f"{place.block}.")
    return f"{head}{new[place.block]}.{rest}"


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


def _weight(shapes: Mapping[str, Shape], prefix: str, rest: str) -> Shape | None:
    for name in (rest, _WAN_ORIGINAL.get(rest, rest)):
        for found in (f"{prefix}{name}.weight", f"{prefix}{name}"):
            if found in shapes:
                return shapes[found]
    return None


def _plain(module: str) -> str:
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _owner(name: str) -> str:
    """The module of a tensor; a parameter on its own is its own."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _numbered(block: str) -> tuple[str, int]:
    stack, _, index = block.rpartition(".")
    return stack, int(index)
