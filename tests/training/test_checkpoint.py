"""A damaged checkpoint is said and passed over; the one before it is used, or the training begins again."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.distributed.world import World
from flcompress.errors import RequestError
from flcompress.files import key_of, sha256
from flcompress.training.checkpoint import MANIFEST, Checkpoints
from flcompress.training.parts import Part

TENSORS = "rank-0.safetensors"


def checkpoints(folder: Path, said: list[str] | None = None) -> Checkpoints:
    return Checkpoints(folder, World(), "local", (said if said is not None else []).append)


def saved(folder: Path, *steps: int) -> Checkpoints:
    made = checkpoints(folder)
    for step in steps:
        made.save(step, {"weight": Part(torch.full((64,), float(step)))})
    return made


def flip(path: Path, place: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def written(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped byte": (lambda one: flip(one / TENSORS), f"{TENSORS} does not match its checksum"),
    "cut file": (lambda one: cut(one / TENSORS), f"{TENSORS} does not match its checksum"),
    "missing file": (lambda one: (one / TENSORS).unlink(), f"{TENSORS} is missing"),
    "missing manifest": (lambda one: (one / MANIFEST).unlink(), f"{MANIFEST} cannot be read: "),
    "empty manifest": (lambda one: written(one / MANIFEST, ""), f"{MANIFEST} cannot be read: "),
    "manifest of nothing": (lambda one: written(one / MANIFEST, "{}"), f"{MANIFEST} cannot be read: 'checksum'"),
    "manifest that is a list": (lambda one: written(one / MANIFEST, "[1]"), f"{MANIFEST} cannot be read: "),
    "manifest of another step": (
        lambda one: written(one / MANIFEST, (one / MANIFEST).read_text().replace('"step": 20', '"step": 21')),
        f"{MANIFEST} does not match its checksum",
    ),
    "manifest that names no file": (
        lambda one: written(one / MANIFEST, (one / MANIFEST).read_text().replace("rank-0", "rank-8")),
        f"{MANIFEST} does not match its checksum",
    ),
    "renamed folder": (
        lambda one: one.rename(one.with_name("step-00000030")),
        f"{MANIFEST} does not match its checksum",
    ),
}


class FullDisk(World):
    """The main process of two, whose disk is full when the other has just begun to write its part."""

    folder: Path

    def all_gather(self, value: object) -> list[object]:
        (work,) = self.folder.glob("checkpoints/.work-*")
        (work / "rank-1.safetensors").write_bytes(b"part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broadcast(self, make: Callable[[], Any]) -> Any:
        return make()


def test_a_failure_takes_no_file_from_another_process(tmp_path: Path) -> None:
    """Whose error about it, with the status of a wrong request, could be the one that is reported."""
    world = FullDisk(rank=0, size=2)
    world.folder = tmp_path
    two = Checkpoints(tmp_path, world, "ddp", print)
    with pytest.raises(OSError, match="No space left"):
        two.save(1, {"weight": Part(torch.zeros(4))})
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["rank-1.safetensors"]
    assert checkpoints(tmp_path).load() == (0, None)
    assert not list(tmp_path.rglob(".work-*"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 10, 20)
    harm, trouble = DAMAGE[damage]
    newest = tmp_path / "checkpoints/step-00000020"
    harm(newest)
    if damage == "renamed folder":
        newest = newest.with_name("step-00000030")
    said: list[str] = []
    step, stored = checkpoints(tmp_path, said).load()
    assert step == 10
    assert stored is not None
    stored.fill("weight", Part(weight := torch.empty(64)))
    assert torch.equal(weight, torch.full((64,), 10.0))
    (line,) = said
    assert line.startswith(f"{newest}: damaged checkpoint removed ({trouble}")
    assert line.endswith("); resuming from step-00000010")
    assert "\n" not in line


def test_where_both_are_damaged_it_begins_again_and_later_ones_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20)
    for name in ("step-00000010", "step-00000020"):
        flip(tmp_path / "checkpoints" / name / TENSORS)
    said: list[str] = []
    again = checkpoints(tmp_path, said)
    assert again.load() == (0, None)
    assert len(said) == 2
    assert said[1].endswith("; no other one is left; beginning this pass again")
    saved(tmp_path, 5)  # would go first if the damaged ones still counted as newer
    assert checkpoints(tmp_path, said).load()[0] == 5
    assert len(said) == 2


def test_two_are_kept_and_what_a_kill_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    left = tmp_path / "checkpoints/.work-00000040-1-1"
    left.mkdir()
    (left / TENSORS).write_bytes(b"half")
    assert checkpoints(tmp_path).load()[0] == 30
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 10)

    def full(*given: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flcompress.training.parts.write_file", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, 20)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
    assert checkpoints(tmp_path).load()[0] == 10


def test_other_writers_are_said(tmp_path: Path) -> None:
    saved(tmp_path, 10)
    said: list[str] = []
    assert Checkpoints(tmp_path, World(), "local", said.append).load()[0] == 10
    assert said == []
    assert Checkpoints(tmp_path, World(), "fsdp2", said.append).load()[0] == 10
    assert said == [
        f"{tmp_path}/checkpoints/step-00000010: written with local on 1 process, resuming with fsdp2 on 1 process: the "
        "same batches and noise, equal up to rounding"
    ]


def test_a_checkpoint_of_another_release_is_refused_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints/step-00000010"
    folder.mkdir(parents=True)
    record = {"step": 10, "layout": "whole", "files": {TENSORS: "0" * 64}}
    written(folder / MANIFEST, json.dumps({**record, "checksum": key_of(**record)}))
    written(folder / TENSORS, "what that release wrote")
    with pytest.raises(RequestError) as caught:
        checkpoints(tmp_path).load()
    assert str(caught.value) == (
        f"{folder}: written by another release of flcompress; resume with that one, or remove {folder.parent} to begin "
        "this pass again"
    )
    assert (folder / TENSORS).exists()


def test_what_is_hashed_is_what_is_on_disk(tmp_path: Path) -> None:
    """Tensors of every kind that a training stores: scalars, counters, half precision, views, none at all."""
    tensors = {
        "weight": torch.arange(12.0).reshape(3, 4).T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "updates": torch.tensor(7),
        "step": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    store = checkpoints(tmp_path)
    store.save(5, {name: Part(value) for name, value in tensors.items()})
    step, stored = store.load()
    assert step == 5
    assert stored is not None
    for name, value in tensors.items():
        # The strides, too, of a tensor that is filled.
        stored.fill(name, Part(filled := torch.empty_like(value)))
        assert filled.stride() == value.stride()
        assert torch.equal(filled, value)
    assert stored.number("updates") == 7
    manifest = json.loads((tmp_path / "checkpoints/step-00000005/checkpoint.json").read_text())
    assert manifest["files"] == {TENSORS: sha256(tmp_path / "checkpoints/step-00000005" / TENSORS)}
