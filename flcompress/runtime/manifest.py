"""Files that exporters write and sessions read: their names, hashes, JSON, copied components."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from flcompress.core.program import Program
from flcompress.core.records import AnyRecord
from flcompress.errors import RequestError
from flcompress.files import sha256
from flcompress.models.configs import read_json
from flcompress.models.loading import meta_transformer
from flcompress.models.stock_files import leftovers, stock_files
from flcompress.tracing.counting import listed_blocks

MANIFEST_FILE = "manifest.json"
"""Name of the file that describes an ONNX or TensorRT export."""

PARTNER_FOLDER = "partner"
"""Folder of the partner's export, inside that of the compressed expert."""

KEPT_FILE = "kept_blocks.json"
"""Name of the file that maps the blocks of an exported transformer to those of its original."""

KEPT_SUFFIXES = (".json", ".safetensors", ".model", ".txt")
"""What a component of a pipeline is made of; anything else (a pickle, an editor's leftover) is not exported."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object; ValueError on a number that is not finite."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(kind: type[AnyRecord], path: Path, make_it: str) -> AnyRecord:
    """Return the record that an exporter wrote.

    Args:
        kind: the record.
        path: the file.
        make_it: the command that writes it, for messages.

    Raises:
        RequestError: missing or damaged.
    """
    if not path.is_file():
        raise RequestError(f"{path}: not exported yet; make it with: {make_it}")
    return kind.read_named(path, "", f"make it again with: {make_it}")


def require_hash(path: Path, expected: str, make_it: str) -> None:
    """RequestError unless the file is there with the SHA-256 its manifest states."""
    if not path.is_file():
        raise RequestError(f"{path}: no such file, but its manifest names it; make it again with: {make_it}")
    actual = sha256(path)
    if actual != expected:
        raise RequestError(
            f"{path}: SHA-256 {actual[:12]}... found, its manifest states {expected[:12]}...; "
            f"make it again with: {make_it}"
        )


def copy_component(source: Path, target: Path) -> None:
    """Copy a component's configuration and the weights that stock loading reads, and nothing else.

    Weights that lie there as a variant alone get their plain names, so that the copy loads without naming it.
    """
    target.mkdir(parents=True)
    weights, skipped = stock_files(source), leftovers(source)
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.suffix not in KEPT_SUFFIXES or path in skipped:
            continue
        if path == weights.index and weights.variant is not None:
            index = json.loads(path.read_text(encoding="utf-8"))
            names = {file.name: weights.plain_name(file) for file in weights.files}
            index["weight_map"] = {name: names[file] for name, file in index["weight_map"].items()}
            write_json(target / weights.plain_name(path), index)
        else:
            shutil.copyfile(path, target / (weights.plain_name(path) if path in weights.files else path.name))


def partner_of(program: Program) -> Program | None:
    """The program whose transformer is the partner, sampled by the same contract; None of a single transformer."""
    if program.contract.experts is None:
        return None
    folder = program.components["partner"]
    graph = listed_blocks(meta_transformer(folder))
    every = {block.path: block.path for block in graph.blocks}
    kept = read_json(folder / KEPT_FILE, "") if (folder / KEPT_FILE).is_file() else every
    return replace(program.with_component("transformer", folder), graph=graph, kept=kept)
