"""`flcompress remap-lora`: rewrite the file or folder of a teacher's LoRA for the pruned model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flcompress.driver.rundir import RUN_FILE, RunDirectory
from flcompress.errors import RequestError
from flcompress.files import move_in_place, replacing, sync, write_text
from flcompress.loras.keys import Remapped, remap
from flcompress.loras.names import PrunedModel
from flcompress.loras.peft_settings import SETTINGS, remap_settings
from flcompress.models.configs import read_json
from flcompress.models.families import find_family
from flcompress.models.families.family import OriginalNames
from flcompress.models.shards import file_metadata, file_tensors, folder_tensors, write_file
from flcompress.runtime.manifest import KEPT_FILE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter's folder, as PEFT saves it."""


def remap_lora(lora: Path, pruned: Path, out: Path, model: Path | None = None) -> dict[str, Any]:
    """Rewrite `lora`, trained for the teacher, to `out` for the pruned model.

    Args:
        lora: a safetensors file, or a folder as PEFT saves it. Keys in the style of diffusers, PEFT, kohya or the
            family's own project; the style is kept.
        pruned: a run directory, an exported folder, or the `kept_blocks.json` next to an exported transformer.
        out: file, or new folder, to write.
        model: the model that a run directory started from, if it has moved.

    Returns:
        A summary as plain data: keys, modules, renumbered and dropped ones.

    Raises:
        RequestError: unsuitable files, a LoRA for another model, or one for removed blocks alone.
    """
    for path in (lora, pruned):
        if out.resolve() == path.resolve():
            raise RequestError(f"--out: {out} is what is read; give another file")
    if not out.parent.is_dir():
        raise RequestError(f"--out: {out.parent}: no such folder; make it first")
    rewrite = _remap_folder if lora.is_dir() else _remap_file
    done, keys = rewrite(lora, pruned_model(pruned, model), out)
    return {
        "out": str(out),
        "keys": {"given": keys, "used": len(done.keys)},
        "modules": len(done.modules),
        "renumbered": done.renumbered,
        "dropped": {block: list(modules) for block, modules in done.dropped.items()},
    }


def _remap_file(lora: Path, target: PrunedModel, out: Path) -> tuple[Remapped, int]:
    """Rewrite a file; return the result and the number of keys in it."""
    if out.is_dir():
        raise RequestError(f"--out: {out} is a folder, expected the name of a file, as for {lora}")
    config = lora.parent / ADAPTER_CONFIG
    settings = read_json(config, "") if config.is_file() else None
    done, tensors = _read(lora, target, settings)
    if settings is not None and _settings(settings, done, config) != settings:
        raise RequestError(
            f"{lora}: {ADAPTER_CONFIG} next to it names modules of the uncut model; give the folder {lora.parent}, so "
            "that both are rewritten"
        )
    with replacing(out) as temporary:
        _write(lora, done, tensors, temporary)
    return done, len(tensors)


def _remap_folder(folder: Path, target: PrunedModel, out: Path) -> tuple[Remapped, int]:
    """Rewrite an adapter as PEFT saves it: weights and settings; texts, such as a model card, are copied."""
    weights, config = folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG
    for file in (config, weights):
        if not file.is_file():
            raise RequestError(
                f"{folder}: has no {file.name}, expected an adapter as PEFT saves it; or give the file of a LoRA"
            )
    if out.exists():
        raise RequestError(f"--out: {out} is there already, expected the name of a new folder, as for {folder}")
    settings = read_json(config, "")
    done, tensors = _read(weights, target, settings)
    work = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _write(weights, done, tensors, work / ADAPTER_WEIGHTS)
        remapped = _settings(settings, done, config)
        write_text(work / ADAPTER_CONFIG, json.dumps(remapped, indent=2, sort_keys=True) + "\n")
        for file in folder.iterdir():
            if file.suffix.lower() in (".md", ".txt"):
                shutil.copyfile(file, work / file.name)
        move_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done, len(tensors)


def _read(lora: Path, target: PrunedModel, settings: Mapping[str, Any] | None) -> tuple[Remapped, dict[str, Any]]:
    """Return the renaming of a file's keys, and its tensors; PEFT's `settings` tell modules saved in full."""
    if not lora.is_file():
        raise RequestError(f"{lora}: no such file; expected a LoRA")
    if lora.suffix != ".safetensors":
        raise RequestError(f"{lora}: only safetensors are read, a pickle can run code; save the LoRA as .safetensors")
    saved_modules: list[str] = []
    if settings is not None:
        saved_modules += settings.get("modules_to_save") or []
        saved_modules += ["bias"] if settings.get("bias", "none") != "none" else []
    tensors = file_tensors(lora)
    try:
        done = remap({key: tensor.shape for key, tensor in tensors.items()}, target, saved_modules)
    except RequestError as error:
        raise RequestError(f"{lora}: {error}") from error
    return done, dict(tensors)


def _write(lora: Path, done: Remapped, tensors: Mapping[str, Any], out: Path) -> None:
    metadata = file_metadata(lora)
    if SETTINGS in metadata:
        try:
            metadata[SETTINGS] = remap_settings(metadata[SETTINGS], done.modules)
        except RequestError as error:
            raise RequestError(f"{lora}: {error}") from error
    write_file(out, {new: tensors[old] for old, new in done.keys.items()}, metadata)
    sync(out)


def _settings(settings: Mapping[str, Any], done: Remapped, file: Path) -> dict[str, Any]:
    """Return PEFT's settings for the pruned model."""
    remapped: dict[str, Any] = json.loads(remap_settings(json.dumps(settings), done.modules, str(file)))
    return remapped


def remapping_text(done: dict[str, Any]) -> str:
    """Return the summary of `remap_lora` as text."""
    dropped = sum(map(len, done["dropped"].values()))
    keys = done["keys"]
    lines = [
        f"{done['out']}: {keys['used']} of {keys['given']} keys used; {done['modules']} modules kept, "
        f"{done['renumbered']} of them in blocks with another number; {dropped} dropped"
        + (f", which touched {len(done['dropped'])} removed or changed blocks:" if dropped else "")
    ]
    lines += [f"  {block}: {', '.join(modules)}" for block, modules in done["dropped"].items()]
    return "\n".join(lines)


def pruned_model(path: Path, model: Path | None = None) -> PrunedModel:
    """Return the pruned model of a run directory, of an exported folder, or of a map of kept blocks next to one.

    `model` is the model that a run directory started from, if it has moved.

    Raises:
        RequestError: none of these.
    """
    if (path / RUN_FILE).is_file():
        run = RunDirectory(path, model)
        program = run.final()
        return PrunedModel(
            name=program.graph.model_class,
            shapes=_shapes(program.components["transformer"]),
            kept=program.kept,
            before=_shapes(program.components["original"]),
            original=_original(program.graph.model_class),
        )
    if (path / "transformer_2").is_dir():
        raise RequestError(
            f"{path}: two experts; give the folder of the one that the LoRA is for, {path}/transformer or "
            f"{path}/transformer_2"
        )
    maps = [path, path / KEPT_FILE, path / "transformer" / KEPT_FILE]
    kept_file = next((path for path in maps if path.is_file()), None)
    if kept_file is None:
        raise RequestError(f"{path}: no run directory, no exported folder and no {KEPT_FILE}; expected one of them")
    names = read_json(kept_file, "")
    if not names or not all(isinstance(old, str) and _is_block(old) and _is_block(new) for new, old in names.items()):
        raise RequestError(f'{kept_file}: no map of kept blocks; expected entries such as "blocks.1": "blocks.3"')
    config = read_json(kept_file.parent / "config.json", f"{KEPT_FILE} is next to an exported transformer")
    name = str(config.get("_class_name"))
    return PrunedModel(name=name, shapes=_shapes(kept_file.parent), kept=names, original=_original(name))


def _original(name: str) -> OriginalNames:
    """Return the original module names of a transformer class's family; none if the family is unknown."""
    family = find_family(name)
    return family.original if family else OriginalNames()


def _is_block(path: str) -> bool:
    stack, _, index = path.rpartition(".")
    return bool(stack) and index.isdecimal()


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in folder_tensors(folder).items()}
