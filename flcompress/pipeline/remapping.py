"""LoRAs of the teacher, rewritten for the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flcompress.errors import RequestError
from flcompress.models.folder import read_json
from flcompress.models.lora import remap
from flcompress.models.lora_names import PrunedModel
from flcompress.models.lora_settings import SETTINGS, remap_settings
from flcompress.models.shards import file_metadata, file_tensors, folder_tensors, write_file
from flcompress.pipeline.durable import sync
from flcompress.pipeline.rundir import RUN_FILE, RunDirectory

KEPT_FILE = "kept_blocks.json"
"""Beside an exported transformer's weights: path of every block -> path in the original."""


def remap_lora(lora: Path, pruned: Path, out: Path) -> dict[str, Any]:
    """Write `lora`, which was made for the teacher, to `out` for the pruned model; returns what was done, plain data.

    Args:
        lora: a safetensors file; keys as diffusers, PEFT, kohya or Wan's own code name them. They stay in that style.
        pruned: a run directory, an exported folder, or the `kept_blocks.json` beside an exported transformer.
        out: file to write.

    Raises:
        RequestError: not such files, a LoRA for another model, or one for removed blocks alone.
    """
    if not lora.is_file():
        raise RequestError(f"{lora}: no such file; expected a LoRA")
    if lora.suffix != ".safetensors":
        raise RequestError(f"{lora}: only safetensors are read, a pickle can run code; save the LoRA as .safetensors")
    for path in (lora, pruned):
        if out.resolve() == path.resolve():
            raise RequestError(f"--out: {out} is what is read; give another file")
    if not out.parent.is_dir():
        raise RequestError(f"--out: {out.parent}: no such folder; make it first")
    model = pruned_model(pruned)
    tensors = file_tensors(lora)
    try:
        done = remap({key: tensor.shape for key, tensor in tensors.items()}, model)
        metadata = file_metadata(lora)
        if SETTINGS in metadata:
            metadata[SETTINGS] = remap_settings(metadata[SETTINGS], done.modules)
    except RequestError as error:
        raise RequestError(f"{lora}: {error}") from error
    work = out.with_name(f".{out.name}.tmp")
    write_file(work, {new: tensors[old] for old, new in done.keys.items()}, metadata)
    sync(work)
    work.replace(out)
    return {
        "out": str(out),
        "modules": len(done.modules),
        "renumbered": done.renumbered,
        "dropped": {block: list(modules) for block, modules in done.dropped.items()},
    }


def remapping_text(done: dict[str, Any]) -> str:
    """What `remap_lora` did, for people."""
    dropped = sum(map(len, done["dropped"].values()))
    lines = [
        f"{done['out']}: {done['modules']} modules kept, {done['renumbered']} of them in blocks with another number; "
        f"{dropped} dropped" + (f", which touched {len(done['dropped'])} removed or changed blocks:" if dropped else "")
    ]
    lines += [f"  {block}: {', '.join(modules)}" for block, modules in done["dropped"].items()]
    return "\n".join(lines)


def pruned_model(place: Path) -> PrunedModel:
    """The pruned model of a run directory, of an exported folder, or beside a map of kept blocks.

    Raises:
        RequestError: none of these.
    """
    if (place / RUN_FILE).is_file():
        run = RunDirectory(place)
        program = run.final()
        return PrunedModel(
            name=program.graph.model_class,
            shapes=_shapes(program.components["transformer"]),
            kept=program.kept,
            before=_shapes(program.components["original"]),
        )
    if (place / "transformer_2").is_dir():
        raise RequestError(
            f"{place}: two experts; give the folder of the one that the LoRA is for, {place}/transformer or "
            f"{place}/transformer_2"
        )
    maps = [place, place / KEPT_FILE, place / "transformer" / KEPT_FILE]
    found = next((path for path in maps if path.is_file()), None)
    if found is None:
        raise RequestError(f"{place}: no run directory, no exported folder and no {KEPT_FILE}; expected one of them")
    kept = read_json(found, "")
    if not kept or not all(isinstance(old, str) and _is_block(old) and _is_block(new) for new, old in kept.items()):
        raise RequestError(f'{found}: no map of kept blocks; expected entries such as "blocks.1": "blocks.3"')
    config = read_json(found.parent / "config.json", f"{KEPT_FILE} lies beside an exported transformer")
    return PrunedModel(name=str(config.get("_class_name")), shapes=_shapes(found.parent), kept=kept)


def _is_block(path: str) -> bool:
    stack, _, index = path.rpartition(".")
    return bool(stack) and index.isdecimal()


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in folder_tensors(folder).items()}
