"""Videos that `apply` encodes on all processes of a launcher, before the pass that reads them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flcompress.core import registry
from flcompress.data import launched
from flcompress.data.encoder import Encoder, ShardResult
from flcompress.errors import FlcompressError
from tests.fixtures.encode_command import contents
from tests.fixtures.fakes import Reader
from tests.training.processes import run, start

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Hook:
    """Know the pass `reader`; note which shards this process encodes, and fail at the first where `fails`."""

    file: Path
    fails: bool = False

    def __call__(self) -> None:
        registry.PASSES["reader"] = f"{Reader.__module__}:Reader"
        make = Encoder.make

        def noted(encoder: Encoder, task: Any) -> ShardResult:
            if self.fails:
                raise FlcompressError(f"{task.file}: cannot be encoded here")
            with self.file.open("a", encoding="utf-8") as file:
                file.write(f"{task.file}\n")
            return make(encoder, task)

        Encoder.make = noted  # type: ignore[method-assign, assignment]
        launched._WORKS["make"] = launched._Work(noted, launched._TASK, launched.RESULT)


def test_all_processes_encode_for_a_pass_of_one(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path
) -> None:
    """The bytes are those of one process; and the failure of one ends all in one line."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    data = f"data: {{videos: {{folder: {videos}, captions: {videos / 'captions.jsonl'}}}}}"
    recipe.write_text(
        f"version: 1\nmodel: {model}\nsampling: {{max_sequence_length: 16}}\n{data}\n"
        "training: {engine: ddp}\npasses: [reader: {}]\n",
        encoding="utf-8",
    )
    command: list[str | Path] = ["apply", recipe, "--run-dir", out, "--quiet"]
    hooks = {0: Hook(tmp_path / "unused"), 1: Hook(tmp_path / "unused", fails=True)}
    ended = start(command, tmp_path / "failed", processes=2, hooks=hooks)
    assert ended.wait() == [1, 1]
    assert [line for text in ended.errors() for line in text.splitlines()] == [
        "error: clips-00000.safetensors: cannot be encoded here"
    ]
    shutil.rmtree(out / "data")
    notes = [tmp_path / "first", tmp_path / "second"]
    run(command, tmp_path / "output", processes=2, hooks={0: Hook(notes[0]), 1: Hook(notes[1])})
    (folder,) = (out / "data").iterdir()
    assert contents(folder) == contents(encoded[0])
    assert [note.read_text(encoding="utf-8").split() for note in notes] == [
        ["prompts-00000.safetensors", "clips-00001.safetensors"], ["clips-00000.safetensors"]
    ]  # fmt: skip
