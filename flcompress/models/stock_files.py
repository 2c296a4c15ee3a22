"""The files of a component's folder that stock loading reads weights from; all others there are leftovers.

Folders from the Hub hold a model twice (an fp16 twin, an EMA), pickles next to safetensors, or shards next to the
single file that they came from. What is checked, hashed, read and exported has to be what a stock pipeline would load.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flcompress.errors import ModelError
from flcompress.files import sha256

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the two libraries name their weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SUFFIXES = (".safetensors", *PICKLES, ".gguf", ".msgpack", ".h5", ".ot", ".onnx")
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")

HASHED_AT_ONCE = 8
"""Files of a folder, such as the shards of a large model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StockFiles:
    """The files of one component's weights.

    Attributes:
        name: what the library names the weights.
        variant: such as fp16, where the folder has no weights without one; `from_pretrained(variant=...)` reads them.
        index: index of the shards; None for a single file.
        files: one safetensors file or several; none where stock loading finds no weights.
    """

    name: str
    variant: str | None = None
    index: Path | None = None
    files: tuple[Path, ...] = ()

    def plain_name(self, path: Path) -> str:
        """Return the name of one of the files, or of the index, for stock loading without a variant."""
        return path.name if self.variant is None else path.name.replace(f".{self.variant}", "", 1)


def stock_files(folder: Path) -> StockFiles:
    """Return the files that stock loading reads a component's weights from.

    The plain ones, or those of the only variant. Of a single file and an index diffusers takes the index, transformers
    the file.

    Raises:
        ModelError: an index that cannot be read.
    """
    name = _library_name(folder)
    for variant in (None, *_only(_variants(folder, name))):
        single, index = (folder / _with_variant(f"{name}.safetensors{end}", variant) for end in ("", ".index.json"))
        if index.is_file() and (name == DIFFUSERS or not single.is_file()):
            files = sorted(set(weight_map(index).values()))
            return StockFiles(name=name, variant=variant, index=index, files=tuple(folder / file for file in files))
        if single.is_file():
            return StockFiles(name=name, variant=variant, files=(single,))
    return StockFiles(name=name)


def required_files(folder: Path) -> StockFiles:
    """Return the files that stock loading reads a component's weights from.

    Raises:
        ModelError: it finds none; says what there is instead.
    """
    weights = stock_files(folder)
    if weights.files:
        return weights
    name, files = weights.name, sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    plain = f"{name}.safetensors"
    for path in files:
        if old := re.fullmatch(rf"{name}\.safetensors\.([^.]+)\.index\.json", path.name):
            raise ModelError(f"{path}: an index under its old name; rename it to {plain}.index.{old[1]}.json")
    if variants := _variants(folder, name):
        first, second = (_with_variant(plain, variant) for variant in variants[:2])
        raise ModelError(
            f"{folder}: several variants ({', '.join(variants)}) and no {plain}; expected one set of weights: keep one "
            f"of {first} and {second}, or rename one to {plain}"
        )
    for path in files:
        if path.suffix in PICKLES:
            raise ModelError(
                f"{path}: a pickle checkpoint can run code when loaded and is refused; expected *.safetensors; "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        if path.suffix == ".gguf":
            raise ModelError(f"{path}: quantised weights (GGUF) are not read; expected {plain}")
        if path.suffix == ".safetensors":
            raise ModelError(
                f"{path}: stock loading does not read a file of this name; expected {plain}, or shards with "
                f"{plain}.index.json"
            )
    raise ModelError(f"{folder}: no weights; expected {plain}, or shards with {plain}.index.json")


def leftovers(folder: Path) -> frozenset[Path]:
    """Return the files of a folder that stock loading never opens: hidden ones, and weights that it does not read."""
    files = [path for path in folder.iterdir() if path.is_file()]
    hidden = frozenset(path for path in files if path.name.startswith("."))
    read = stock_files(folder)
    if not read.files and not (folder / "model_index.json").is_file():
        return hidden
    weights = {path for path in files if path.suffix in _SUFFIXES or _INDEX.fullmatch(path.name)}
    return hidden | (weights - {*read.files, read.index})


def files_of(folder: Path) -> list[Path]:
    """Return all files of a folder and those below it, sorted, without hidden ones and leftovers."""
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    skipped = leftovers(folder)
    own = [path for path in folder.iterdir() if path.is_file() and path not in skipped]
    return sorted([*own, *(path for subfolder in below for path in files_of(subfolder))])


def weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file name} of an index of shards.

    Raises:
        ModelError: no such index, or one that names files outside its own folder.
    """
    try:
        files = {str(name): str(file) for name, file in json.loads(index.read_bytes())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: no index of shards (weight_map); copy the file again") from error
    for file in files.values():
        if Path(file).name != file:
            raise ModelError(f"{index}: names the shard {file!r}, expected a file of its own folder")
    return files


def _library_name(folder: Path) -> str:
    """Return what the library of a folder's `config.json` names weights; without one, what the files are named."""
    config: Any = None
    with suppress(OSError, ValueError):  # a damaged one is found where configurations are checked
        config = json.loads((folder / "config.json").read_bytes())
    config = config if isinstance(config, dict) else {}
    if "_class_name" not in config and ("model_type" in config or "architectures" in config):
        return TRANSFORMERS
    named = any(folder.glob(f"{TRANSFORMERS}*.safetensors*")) and not any(folder.glob(f"{DIFFUSERS}*.safetensors*"))
    return TRANSFORMERS if named and "_class_name" not in config else DIFFUSERS


def _variants(folder: Path, name: str) -> list[str]:
    """Return the variants that a folder holds weights of."""
    pattern = re.compile(rf"{name}\.(?:(?P<single>[^.]+)\.safetensors|safetensors\.index\.(?P<index>[^.]+)\.json)")
    matches = (match for path in folder.iterdir() if path.is_file() and (match := pattern.fullmatch(path.name)))
    names = {match["single"] or match["index"] for match in matches}
    return sorted(variant for variant in names if not _SHARD.search(variant))


def _only(variants: list[str]) -> list[str]:
    return variants if len(variants) == 1 else []


def _with_variant(file: str, variant: str | None) -> str:
    """Return a file's name with a variant, where both libraries put it: before the last suffix."""
    stem, _, suffix = file.rpartition(".")
    return file if variant is None else f"{stem}.{variant}.{suffix}"


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's files, except those that stock loading never opens."""
    digest, files = hashlib.sha256(), files_of(folder)
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:  # hashing lets other threads run
        for path, own in zip(files, pool.map(_digest_of, files), strict=True):
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(own.encode())
    return digest.hexdigest()


def _digest_of(path: Path) -> str:
    stat = path.stat()
    return _file_digest(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, modified: int, size: int) -> str:
    return sha256(path)
