"""Rename the keys of a LoRA for the same model without some of its blocks, by names and shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flcompress.errors import RequestError
from flcompress.loras.kinds import is_between_halves, misfit, module_of, saved_module_of
from flcompress.loras.names import ModuleName, Modules, PrunedModel, Shape, plain, rename_key

_SECOND = "transformer_2."
_ELSEWHERE = ("text_encoder", "lora_te", "clip_l.", "clip_g.", "t5xxl.", "llava.", "conditioner.")
"""Prefixes of keys for other parts of the pipeline, which stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Remapped:
    """Result of renaming a LoRA's keys.

    Attributes:
        keys: {key in the LoRA: its new key}, for the kept keys.
        dropped: {block of the uncut model: its modules in the LoRA that no longer exist}, because the block was removed
            or became another kind, such as the last one without a text branch.
        modules: {name: new name} of the transformer's modules that are kept.
        renumbered: number of those whose block has another index now.
    """

    keys: Mapping[str, str]
    dropped: Mapping[str, tuple[str, ...]]
    modules: Mapping[str, str]
    renumbered: int


def remap(lora: Mapping[str, Shape], model: PrunedModel, saved_modules: Collection[str] | None = None) -> Remapped:
    """Rename the keys of a LoRA for the uncut model to those of the pruned one.

    Args:
        lora: shapes of the LoRA's tensors, by key. LoHa, LoKr and full differences are accepted too.
        model: the pruned model.
        saved_modules: endings of modules that are saved in full next to the adapter, such as "proj_out"; "bias" for
            every bias.

    Raises:
        RequestError: no LoRA, one for another model, or one for removed blocks alone.
    """
    known = Modules(model)
    keys: dict[str, str] = {}
    remaining: dict[str, ModuleName] = {}
    modules: dict[str, tuple[str, ModuleName]] = {}
    dropped: dict[str, dict[str, None]] = {}
    others: dict[tuple[str, Shape], dict[str, int]] = {}
    for key in sorted(lora, key=is_between_halves, reverse=True):
        shape = lora[key]
        if key.startswith(_ELSEWHERE):
            keys[key] = key
            continue
        if key.startswith(_SECOND):
            raise RequestError(
                f"{key}: of the second transformer of a model of two experts (Wan 2.2 A14B), but the pruned "
                f"{model.name} is alone; give the LoRA of its own expert"
            )
        module, kind = _module_of(key, saved_modules or ())
        parsed = known.parse(module)
        weights = known.shapes(parsed)
        if not weights:
            raise RequestError(_unknown(key, parsed, model))
        wrong = {weight: misfit(kind, shape, weight, others.setdefault((module, weight), {})) for weight in weights}
        if all(wrong.values()):
            raise RequestError(f"{key}: has shape {list(shape)}, {wrong[weights[0]]}; this LoRA is for another model")
        modules[key] = module, parsed
        if known.shape(parsed) not in [weight for weight, fault in wrong.items() if not fault]:
            dropped.setdefault(parsed.block, {})[parsed.rest] = None
    for key, (module, parsed) in modules.items():
        if parsed.rest not in dropped.get(parsed.block, {}):
            keys[key] = rename_key(key, parsed, known.new)
            remaining[module] = parsed
    if not remaining:
        if dropped:
            raise RequestError(
                f"all {sum(map(len, dropped.values()))} modules of this LoRA are in blocks that were removed "
                f"({', '.join(sorted(dropped, key=_block_order))}); nothing of it is left"
            )
        raise RequestError("no tensor of this file is for the transformer; expected a LoRA of the uncut model")
    return Remapped(
        keys={key: keys[key] for key in lora if key in keys},
        dropped={block: tuple(sorted(dropped[block])) for block in sorted(dropped, key=_block_order)},
        modules={plain(old): plain(rename_key(old, parsed, known.new)) for old, parsed in remaining.items()},
        renumbered=sum(bool(parsed.stack) and known.new[parsed.block] != parsed.block for parsed in remaining.values()),
    )


def _module_of(key: str, saved_modules: Collection[str]) -> tuple[str, str]:
    """Return (module, kind of tensor); RequestError if the kind is not supported."""
    if match := module_of(key):
        return match
    if match := saved_module_of(key):
        module, kind = match
        named = any(f".{plain(module)}".endswith(f".{name}") for name in saved_modules)
        if named or (kind == "bias" and "bias" in saved_modules):
            return module, {"weight": "set_weight", "bias": "bias"}[kind]
    raise RequestError(
        f"{key}: no tensor of a LoRA, LoHa or LoKr that is read; expected names such as "
        "blocks.0.attn1.to_q.lora_A.weight; merge another kind of adapter into the model before it is compressed"
    )


def _unknown(key: str, module: ModuleName, model: PrunedModel) -> str:
    where = f"{module.block}.{module.rest}" if module.stack else module.rest
    project = ", and of its own project's code" if model.original.modules else ""
    return (
        f"{key}: {model.name} has no module '{where}' by this name; names of diffusers, PEFT and kohya are read"
        f"{project}; convert the names, or give a LoRA of this model"
    )


def _block_order(block: str) -> tuple[str, int]:
    stack, _, index = block.rpartition(".")
    return stack, int(index)
