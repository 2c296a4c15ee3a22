"""Module names in LoRAs, and the modules they mean in a model that lacks some of its blocks."""

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
"""Prefixes of names whose dots are underscores, as kohya, musubi-tuner and LyCORIS write them."""


@dataclass(frozen=True, kw_only=True)
class PrunedModel:
    """The model that a LoRA is remapped for.

    Attributes:
        name: name in messages.
        shapes: shapes of its tensors, by name.
        kept: path of a block -> path in the uncut model.
        before: shapes of the uncut model's tensors; None if only the pruned model is known.
        original: module names in the family's own project.
    """

    name: str
    shapes: Mapping[str, Shape]
    kept: Mapping[str, str]
    before: Mapping[str, Shape] | None = None
    original: OriginalNames = field(default_factory=OriginalNames)


@dataclass(frozen=True)
class ModuleName:
    """A parsed module name: module `rest` of the block `stack.index`, or of the model if there is no stack.

    `rest` and `spelled`, the stack, are spelled as in the key; `stack` is the stock class's name.
    """

    stack: str
    index: int
    rest: str
    spelled: str = ""

    @property
    def block(self) -> str:
        """Path of the block in the uncut model."""
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
        spelled = {stack: stack for stack in own}
        spelled |= {theirs: ours for theirs, ours in self.model.original.stacks.items() if ours in own}
        self.stacks = dict(sorted(spelled.items(), key=lambda item: len(item[0]), reverse=True))
        inside = re.compile(rf"({'|'.join(map(re.escape, sorted(own, key=len, reverse=True)))})\.\d+\.")
        stock = {_owner(inside.sub("", name, count=1)) for name in (*self.model.shapes, *(self.model.before or ()))}
        self._flat = {_flat(name): name for name in (*stock, *self.model.original.modules)}

    def parse(self, module: str) -> ModuleName:
        """Parse a module's name in the uncut model."""
        flat = _FLAT.match(module)
        text = module[flat.end() :] if flat else plain(module)
        for spelled, stack in self.stacks.items():
            name, dot = (_flat(spelled), "_") if flat else (re.escape(spelled), r"\.")
            match = re.match(rf"{name}{dot}(\d+)(?:{dot}(.+))?$", text)
            if match:
                rest = match[2] or ""
                return ModuleName(stack, int(match[1]), self._flat.get(rest, rest) if flat else rest, spelled)
        return ModuleName("", -1, self._flat.get(text, text) if flat else text)

    def shapes(self, module: ModuleName) -> list[Shape]:
        """Return the shapes of the weight (or of the parameter itself) in the uncut model; none if it lacks the module.

        There are several if only the pruned model is known: those of the block there, and those of its neighbours, in
        case it was removed or became another kind.
        """
        pruned = self.shape(module)
        if not module.stack:
            return [] if pruned is None else [pruned]
        if self.model.before is not None:
            known = self._weight(self.model.before, f"{module.block}.", module.rest)
            return [shape for shape in (known or pruned,) if shape is not None]
        siblings = [new for new in self.model.kept if new.rpartition(".")[0] == module.stack]
        shapes = [pruned, *(self._weight(self.model.shapes, f"{path}.", module.rest) for path in siblings)]
        return list(dict.fromkeys(shape for shape in shapes if shape is not None))

    def shape(self, module: ModuleName) -> Shape | None:
        """Return the shape of the weight in the pruned model; None if it is not there."""
        if not module.stack:
            return self._weight(self.model.shapes, "", module.rest)
        if module.block not in self.new:
            return None
        return self._weight(self.model.shapes, f"{self.new[module.block]}.", module.rest)

    def _weight(self, shapes: Mapping[str, Shape], prefix: str, rest: str) -> Shape | None:
        for name in (rest, *self.model.original.modules.get(rest, rest).split(" | ")):
            parts = [_find(shapes, f"{prefix}{part}") for part in name.split(" + ")]
            known = [part for part in parts if part is not None]
            if known and len(known) == len(parts):
                return known[0] if len(known) == 1 else (sum(part[0] for part in known), *known[0][1:])
        return None


def rename_key(key: str, module: ModuleName, new: Mapping[str, str]) -> str:
    """Return the key with its block's index in the pruned model."""
    if not module.stack:
        return key
    number = new[module.block].rpartition(".")[2]
    flat = _FLAT.match(key)
    old, after = (_flat(module.spelled), "_") if flat else (module.spelled, ".")
    head, _, rest = key.partition(f"{old}{after}{module.index}")
    return f"{head}{old}{after}{number}{rest}"


def plain(module: str) -> str:
    """Return a module's name without the prefixes of libraries."""
    stripped = module
    for prefix in _PREFIXES:
        stripped = stripped.removeprefix(prefix)
    return stripped if stripped == module else plain(stripped)


def _find(shapes: Mapping[str, Shape], name: str) -> Shape | None:
    return shapes.get(f"{name}.weight", shapes.get(name))


def _owner(name: str) -> str:
    """Return the module of a tensor; a bare parameter is its own."""
    return name.removesuffix(".weight").removesuffix(".bias")


def _flat(name: str) -> str:
    return name.replace(".", "_")
