"""The files of a latent dataset: an index with checksums, shards of clips, shards of prompts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save

from flcompress.data.sizes import Size
from flcompress.errors import DataError

INDEX_FILE = "index.json"
SKIPPED_FILE = "skipped.jsonl"
WORK = ".encoding"
"""In the folder of an unfinished dataset: its plan, and what of it is done."""
LATENTS = "latents"
PER_CLIP = "conditioning."
"""Prefix, in a shard of clips, of what else conditions each clip, such as its first frame."""
EMPTY = 0
"""The empty prompt is the first of every dataset: dropped captions need it, and guidance without another negative."""
NEGATIVE = "negative_prompt"
"""Key of a request, absent where guidance leads away from the empty prompt."""

_MEND = "encode again with the same command: only the damaged shard is redone"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Clip(_Part):
    """One clip: its file, relative to the folder of videos, and the number of its prompt."""

    file: str
    prompt: int


class Shard(_Part):
    """One file of tensors."""

    file: str
    sha256: str
    bytes: int


class PromptShard(Shard):
    """`prompts` prompts; tensor NAME is [prompts, ...]."""

    prompts: int


class ClipShard(Shard):
    """Clips of one size (frames, height, width in pixels): `latents` [clips, channels, frames', height', width']."""

    size: Size
    clips: tuple[Clip, ...]


class Index(_Part):
    """`index.json`.

    Attributes:
        request: what the dataset was made from and how; another request is another dataset.
        prompts: the texts, each once; the first is the empty one, the second the negative one where there is one.
        prompt_shards: prompts, in order.
        clip_shards: clips, in order; none in a dataset of prompts only.
    """

    format: Literal["flcompress-latents"] = "flcompress-latents"
    version: Literal[1] = 1
    request: dict[str, Any] = Field(default_factory=dict)
    prompts: tuple[str, ...]
    prompt_shards: tuple[PromptShard, ...]
    clip_shards: tuple[ClipShard, ...] = ()

    @property
    def negative_prompt(self) -> str:
        """What guidance leads away from; "" is the empty prompt."""
        return str(self.request.get(NEGATIVE, ""))

    @property
    def captions_start(self) -> int:
        """Number of the first prompt that is a caption."""
        return len(leading(self.negative_prompt))

    @property
    def shards(self) -> tuple[Shard, ...]:
        return (*self.prompt_shards, *self.clip_shards)

    @property
    def clips(self) -> int:
        return sum(len(shard.clips) for shard in self.clip_shards)

    def write(self, folder: Path) -> None:
        """Write `index.json` in one piece."""
        text = self.model_dump_json(indent=1) + "\n"
        temporary = folder / f".{INDEX_FILE}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / INDEX_FILE)

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read what `write` wrote; DataError where there is none, or something else."""
        path = folder / INDEX_FILE
        try:
            made = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            if (folder / WORK).is_dir():
                raise DataError(
                    f"{folder}: an unfinished latent dataset; give the same flcompress encode again, it goes on"
                ) from error
            raise DataError(
                f"{folder}: not a latent dataset (no {INDEX_FILE}); expected a folder that flcompress encode wrote"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(f"{path}: {place}: {first['msg']}; encode again into a new folder") from error
        told, held = len(made.prompts), sum(shard.prompts for shard in made.prompt_shards)
        if told != held or any(clip.prompt >= told for shard in made.clip_shards for clip in shard.clips):
            raise DataError(f"{path}: its prompts and shards do not fit together; encode again into a new folder")
        return made


def leading(negative_prompt: str) -> tuple[str, ...]:
    """Prompts of a dataset before its captions."""
    return ("", negative_prompt) if negative_prompt else ("",)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """Write a shard in one piece; returns (SHA-256, bytes)."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return hashlib.sha256(data).hexdigest(), len(data)


def check_sizes(folder: Path, index: Index) -> None:
    """Raise DataError, naming the shard, unless all are there with the size that the index tells."""
    for shard in index.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DataError(f"{path}: no such shard; {INDEX_FILE} names it; {_MEND}")
        if size != shard.bytes:
            raise DataError(f"{path}: {size:,} bytes given, expected {shard.bytes:,}; {_MEND}")


def check_contents(folder: Path, index: Index) -> None:
    """Raise DataError, naming the shard, unless all have the checksum that the index tells."""
    check_sizes(folder, index)
    for shard in damaged(folder, index.shards):
        raise DataError(f"{folder / shard.file}: damaged (its SHA-256 is not the one in {INDEX_FILE}); {_MEND}")


def damaged(folder: Path, shards: Iterable[Shard]) -> list[Shard]:
    """The shards whose files are missing or have another checksum."""
    known = list(shards)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        whole = pool.map(lambda shard: _is_whole(folder / shard.file, shard), known)
        return [shard for shard, fine in zip(known, whole, strict=True) if not fine]


def _is_whole(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
