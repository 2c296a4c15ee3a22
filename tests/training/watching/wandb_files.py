"""Reads what Weights & Biases keeps of a run offline: a log of LevelDB's format, of protocol buffers of its own."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

_BLOCK, _HEADER = 32768, 7
"""Bytes of LevelDB's blocks, and of what stands before each fragment of a record, and before the first block."""


def offline_runs(folder: Path) -> list[Path]:
    """The files of all commands that logged below `folder`, oldest first."""
    return sorted(folder.glob("**/wandb/offline-run-*/run-*.wandb"))


def run_id(file: Path) -> str:
    return next(str(record.run.run_id) for record in _records(file) if record.HasField("run"))


def exit_status(file: Path) -> int | None:
    """What a run ended with; None for one that was killed."""
    found = [int(record.exit.exit_code) for record in _records(file) if record.HasField("exit")]
    return found[-1] if found else None


def history(file: Path) -> list[dict[str, Any]]:
    """What was logged, one dictionary a step, with its number as `_step`."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in _records(file)
        if record.HasField("history")
    ]


def _records(file: Path) -> list[Any]:
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data, at, found, whole = file.read_bytes(), _HEADER, [], b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        if kind == 0:  # the rest of a block that no fragment fitted in
            at += left
            continue
        whole += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if kind in (1, 4):  # a whole record, or the last fragment of one
            found.append(messages.Record.FromString(whole))
            whole = b""
    return found
