"""The names that LoRAs give to the modules of a model, and where those lie in one that lacks some of its blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flcompress.models.families.family import OriginalNames

Shape = tuple[int, ...]

_PREFIXES = (
    "base_model.model.",
    "model.",
    "transformer.",
    "diffusion_model.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "module.",
    "_orig_mod.",
)
_FLAT = re.compile(r"lora_unet_|lora_transformer_|lycoris_")
"""Before names whose dots are underscores, as kohya, musubi-tuner and LyCORIS write them."""


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """What a LoRA is remapped for.

    Attributes:
        name: for messages.
        shapes: of the pruned model's tensors, by name.
        kept: path of a block in it -> path in the model that it was cut from.
        before: shapes of that model's tensors; None where only the pruned model is known.
        original: the names that the family's own project gives to modules.
    """

    name: str
    shapes: Mapping[str, Shape]
    kept: Mapping[str, str]
    before: Mapping[str, Shape] | None = None
    original: OriginalNames = field(default_factory=OriginalNames)


@dataclass(frozen=True)
class Place:
    """A module that a key names: `rest` of the block `stack.index`, or of the whole model (no stack).

    `rest` and `spelled`, the stack, are as the key has them; `stack` is the stock class's.
    """

    stack: str
    index: int
    rest: str
    spelled: str = ""

    @property
    def block(self) -> str:
        return f"{self.stack}.{self.index}"


@dataclass
class Modules:
    """Lookup of a model's modules by the names that LoRAs use."""

    model: PrunedModel
    new: dict[str, str] = field(init=False)
    stacks: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.new = {old: new for new, old in self.model.kept.items()}
        own = {path.rpartition(".")[0] for path in self.new}
        spelled = {one: one for one in own}
        spelled |= {theirs: ours for theirs, ours in self.model.original.stacks.items() if ours in own}
        self.stacks = dict(sorted(spelled.items(), key=lambda item: len(item[0]), reverse=True))
        inside = re.compile(rf"({'|'.join(map(re.escape, sorted(own, key=len, reverse=True)))})\.\d+\.")
        stock = {_owner(inside.sub("", name, count=1)) for name in (*self.model.shapes, *(self.model.before or ()))}
        self._flat = {_flat(name): name for name in (*stock, *self.model.original.modules)}

    def place(self, module: str) -> Place:
        """Where a module, named as in the uncut model, lies."""
        flat = _FLAT.match(module)
        text = module[flat.end() :] if flat else plain(module)
        for spelled, stack in self.stacks.items():
            name, dot = (_flat(spelled), "_") if flat else (re.escape(spelled), r"\.")
            found = re.match(rf"{name}{dot}(\d+)(?:{dot}(.+))?$", text)
            if found:
                rest = found[2] or ""
                return Place(stack, int(found[1]), self._flat.get(rest, rest) if flat else rest, spelled)
        return Place("", -1, self._flat.get(text, text) if flat else text)

    def shapes(self, place: Place) -> list[Shape]:
        """Shapes of the weight (or of the parameter itself) in the uncut model; none where it has no such module.

        Several where only the pruned model is known: a block has the shapes that it has there, or those of its
        neighbours if it is gone or has become another kind.
        """
        now = self.shape(place)
        if not place.stack:
            return [] if now is None else [now]
        if self.model.before is not None:
            known = self._weight(self.model.before, f"{place.block}.", place.rest)
            return [shape for shape in (known or now,) if shape is not None]
        alike = [new for new in self.model.kept if new.rpartition(".")[0] == place.stack]
        shapes = [now, *(self._weight(self.model.shapes, f"{path}.", place.rest) for path in alike)]
        return list(dict.fromkeys(shape for shape in shapes if shape is not None))

    def shape(self, place: Place) -> Shape | None:
        """Shape of the weight in the pruned model; None where it is not in it."""
        if not place.stack:
            return self._weight(self.model.shapes, "", place.rest)
        if place.block not in self.new:
            return None
        return self._weight(self.model.shapes, f"{self.new[place.block]}.", place.rest)

    def _weight(self, shapes: Mapping[str, Shape], prefix: str, rest: str) -> Shape | None:
        for name in (rest, *self.model.original.modules.get(rest, rest).split(" | ")):
            parts = [_found(shapes, f"{prefix}{part}") for part in name.split(" + ")]
            whole = [part for part in parts if part is not None]
            if whole and len(whole) == len(parts):
                return whole[0] if len(whole) == 1 else (sum(part[0] for part in whole), *whole[0][1:])
        return None


def renamed(key: str, place: Place, new: Mapping[str, str]) -> str:
    """The key with its block's number in the cut model."""
    if not place.stack:
        return key
    number = new[place.block].rpartition(".")[2]
    flat = _FLAT.match(key)
    old, after = (_flat(place.spelled), "_") if flat else (place.spelled, ".")
    head, _, rest = key.partition(f"{old}{after}{place.index}")
    return f"{head}{old}{after}{number}{rest}"


def plain(module: str) -> str:
    """A module's name without what libraries put before it."""
    stripped = module
    for prefix in _PREFIXES:
        stripped = stripped.removeprefix(prefix)
    return stripped if stripped == module else plain(stripped)


def _found(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    return shapes.get(f"{name}.weight", shapes.get(name))


def _owner(name: str) -> str:
    """The module of a tensor; a parameter on its own is its own."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _flat(name: str) -> str:
    return name.replace(".", "_")
