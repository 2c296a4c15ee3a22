"""Files of a latent dataset: an index with checksums, shards of clips, shards of prompts."""

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
from flcompress.files import replacing, sha256, write_text

INDEX_FILE = "index.json"
SKIPPED_FILE = "skipped.jsonl"
WORK = ".encoding"
"""Folder within an unfinished dataset: its plan, and the results so far."""
LATENTS = "latents"
PER_CLIP = "conditioning."
"""Prefix of a clip shard's tensors of per-clip conditioning, such as the first frame."""
EMPTY = 0
"""Index of the empty prompt, the first of every dataset: for dropped captions, and for guidance by default."""
NEGATIVE = "negative_prompt"
"""Key of a request, absent if the negative prompt is the empty one."""

_FIX = "encode again with the same command: only the damaged shard is redone"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ClipRecord(_Part):
    """A clip: its file, relative to the folder of videos, and the index of its prompt."""

    file: str
    prompt: int


class Shard(_Part):
    """A file of tensors."""

    file: str
    sha256: str
    bytes: int


class PromptShard(Shard):
    """A shard of `prompts` prompts; every tensor is [prompts, ...], or compacted, see `flcompress.data.compact`."""

    prompts: int


class ClipShard(Shard):
    """A shard of clips of one size (frames, height, width in pixels).

    Its tensor `latents` is [clips, channels, latent frames, latent height, latent width]; see `compact` for others.
    """

    size: Size
    clips: tuple[ClipRecord, ...]


class Index(_Part):
    """`index.json`.

    Attributes:
        version: 1 where all conditioning is padded and in fp32; shards of both kinds are read.
        request: source and settings of the dataset; another request is another dataset.
        prompts: distinct texts; the first is empty, the second the negative prompt if there is one.
        prompt_shards: shards of the prompts, in order.
        clip_shards: shards of the clips, in order; none in a dataset of prompts only.
    """

    format: Literal["flcompress-latents"] = "flcompress-latents"
    version: Literal[1, 2] = 2
    request: dict[str, Any] = Field(default_factory=dict)
    prompts: tuple[str, ...]
    prompt_shards: tuple[PromptShard, ...]
    clip_shards: tuple[ClipShard, ...] = ()

    @property
    def negative_prompt(self) -> str:
        """Negative prompt of guidance."""
        return str(self.request.get(NEGATIVE, ""))

    @property
    def captions_start(self) -> int:
        """Index of the first prompt that is a caption."""
        return len(leading_prompts(self.negative_prompt))

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards: prompts, then clips."""
        return (*self.prompt_shards, *self.clip_shards)

    @property
    def clips(self) -> int:
        """Number of clips."""
        return sum(len(shard.clips) for shard in self.clip_shards)

    def write(self, folder: Path) -> None:
        """Write `index.json` atomically."""
        write_text(folder / INDEX_FILE, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read `index.json`; DataError if it is missing or invalid."""
        path = folder / INDEX_FILE
        try:
            index = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            if (folder / WORK).is_dir():
                raise DataError(
                    f"{folder}: an unfinished latent dataset; give the same flcompress encode again, it resumes"
                ) from error
            raise DataError(
                f"{folder}: not a latent dataset (no {INDEX_FILE}); expected a folder that flcompress encode wrote"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(map(str, first["loc"])) or "the file"
            raise DataError(f"{path}: {location}: {first['msg']}; encode again into a new folder") from error
        prompts, sharded = len(index.prompts), sum(shard.prompts for shard in index.prompt_shards)
        if prompts != sharded or any(clip.prompt >= prompts for shard in index.clip_shards for clip in shard.clips):
            raise DataError(f"{path}: its prompts and shards do not fit together; encode again into a new folder")
        return index


def leading_prompts(negative_prompt: str) -> tuple[str, ...]:
    """Return the prompts that precede the captions of a dataset."""
    return ("", negative_prompt) if negative_prompt else ("",)


def write_shard(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[str, int]:
    """Write a shard atomically, and return (SHA-256, bytes)."""
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest(), len(data)


def check_sizes(folder: Path, index: Index) -> None:
    """Raise DataError, naming the shard, unless every shard exists with the size in the index."""
    for shard in index.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise DataError(f"{path}: no such shard; {INDEX_FILE} names it; {_FIX}")
        if size != shard.bytes:
            raise DataError(f"{path}: {size:,} bytes given, expected {shard.bytes:,}; {_FIX}")


def check_contents(folder: Path, index: Index) -> None:
    """Raise DataError, naming the shard, unless every shard has the checksum in the index."""
    check_sizes(folder, index)
    for shard in damaged_shards(folder, index.shards):
        raise DataError(f"{folder / shard.file}: damaged (its SHA-256 is not the one in {INDEX_FILE}); {_FIX}")


def damaged_shards(folder: Path, shards: Iterable[Shard]) -> list[Shard]:
    """Return the shards whose files are missing or have another checksum."""
    listed = list(shards)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        intact = pool.map(lambda shard: _is_intact(folder / shard.file, shard), listed)
        return [shard for shard, good in zip(listed, intact, strict=True) if not good]


def _is_intact(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.bytes:
        return False
    return sha256(path) == shard.sha256
