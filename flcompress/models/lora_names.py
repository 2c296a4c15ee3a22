"""The names that LoRAs give to the modules of a model, and where those lie in one that lacks some of its blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]

_PREFIXES = ("base_model.model.", "model.", "transformer.", "diffusion_model.")
_FLAT = "lora_unet_"
"""Before names whose dots are underscores (kohya's style)."""

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


@dataclass(frozen=True)
class Place:
    """A module that a key names: `rest` of the block `stack.index`, or of the whole model (no stack)."""

    stack: str
    index: int
    rest: str

    @property
    def block(self) -> str:
        return f"{self.stack}.{self.index}"


@dataclass
class Modules:
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

    def place(self, module: str) -> Place:
        """Where a module, named as in the uncut model, lies."""
        if module.startswith(_FLAT):
            text = module.removeprefix(_FLAT)
            for stack in self.stacks:
                found = re.match(rf"{re.escape(_flat(stack))}_(\d+)_(.+)$", text)
                if found:
                    return Place(stack, int(found[1]), self._flat.get(found[2], found[2]))
            return Place("", -1, self._flat.get(text, text))
        text = plain(module)
        for stack in self.stacks:
            found = re.match(rf"{re.escape(stack)}\.(\d+)\.(.+)$", text)
            if found:
                return Place(stack, int(found[1]), found[2])
        return Place("", -1, text)

    def shapes(self, place: Place) -> list[Shape]:
        """Shapes of the weight (or of the parameter itself) in the uncut model; none where it has no such module.

        Several where the uncut model is not at hand: a block has the shapes of the pruned model, or those of its
        neighbours if it is gone or has become another kind.
        """
        now = self.shape(place)
        if not place.stack:
            return [] if now is None else [now]
        if self.model.before is not None:
            known = _weight(self.model.before, f"{place.block}.", place.rest)
            # The uncut model may be known in part.
            return [shape for shape in (known or now,) if shape is not None]
        alike = [new for new in self.model.kept if new.rpartition(".")[0] == place.stack]
        shapes = [now, *(_weight(self.model.shapes, f"{path}.", place.rest) for path in alike)]
        return list(dict.fromkeys(shape for shape in shapes if shape is not None))

    def shape(self, place: Place) -> Shape | None:
        """Shape of the weight in the pruned model; None where it is not in it."""
        if not place.stack:
            return _weight(self.model.shapes, "", place.rest)
        if place.block not in self.new:
            return None
        return _weight(self.model.shapes, f"{self.new[place.block]}.", place.rest)


def renamed(key: str, place: Place, new: Mapping[str, str]) -> str:
    if not place.stack:
        return key
    if key.startswith(_FLAT):
        old = f"{_FLAT}{_flat(place.block)}_"
        return f"{_FLAT}{_flat(new[place.block])}_{key.removeprefix(old)}"
    head, _, rest = key.partition(f"{place.block}.")
    return f"{head}{new[place.block]}.{rest}"


def _weight(shapes: Mapping[str, Shape], prefix: str, rest: str) -> Shape | None:
    for name in (rest, _WAN_ORIGINAL.get(rest, rest)):
        for found in (f"{prefix}{name}.weight", f"{prefix}{name}"):
            if found in shapes:
                return shapes[found]
    return None


def plain(module: str) -> str:
    """A module's name without what libraries put before it."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _owner(name: str) -> str:
    """The module of a tensor; a parameter on its own is its own."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _flat(name: str) -> str:
    return name.replace(".", "_")
