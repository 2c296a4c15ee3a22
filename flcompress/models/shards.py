"""Weights on disk, tensor by tensor: read, checked and written again in pieces, never a whole file in memory.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header with every tensor's dtype, shape
and place, and the tensors' bytes. The library maps whole files, which a process is charged for page by page; so the
header is checked by the library and the bytes are read here.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.errors import ModelError
from flcompress.files import move_in_place
from flcompress.models.stock_files import DIFFUSERS, required_files, weight_map

if TYPE_CHECKING:
    import torch

PIECE = 1 << 24
"""Bytes read at once."""

LARGEST_SHARD = 5 * 10**9
"""Bytes of tensors in one written file, unless a single tensor is larger."""

_FLOATS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_NUMBERS = {**_FLOATS, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_NAMES = {number: name for name, number in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file: `size` bytes from byte `start` on; `dtype` as the file names it (BF16)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, at most `PIECE` at once.

        Raises:
            ModelError: the file has become shorter.
        """
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                piece = file.read(min(PIECE, left))
                if not piece:
                    raise ModelError(f"{self.file}: ends before its last tensor; copy the file again")
                left -= len(piece)
                yield piece

    @property
    def floating(self) -> bool:
        """True if its numbers have a fraction."""
        return self.dtype in _FLOATS

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def numbers(self, first: int, count: int) -> StoredTensor:
        """Return numbers `first` to `first + count - 1` in row-major order: a tensor [count] within this one."""
        width = _width(self)
        return replace(self, shape=(count,), start=self.start + first * width, size=count * width)

    def rows(self, first: int, count: int) -> StoredTensor:
        """Return rows `first` to `first + count - 1` of its first axis: a tensor within this one."""
        row = self.size // max(self.shape[0], 1)
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + first * row, size=count * row)

    def fill(self, target: torch.Tensor) -> None:
        """Copy the numbers into a contiguous tensor of the same length, in its dtype and on its device, piece by piece.

        Raises:
            ModelError: a dtype that is not known, or the file has become shorter.
        """
        import torch

        if self.dtype not in _NUMBERS:
            raise ModelError(f"{self.file}: a tensor in {self.dtype}, expected {', '.join(_NUMBERS)}; convert the file")
        flat, position = target.detach().view(-1), 0
        for piece in self.pieces():
            numbers = torch.frombuffer(bytearray(piece), dtype=getattr(torch, _NUMBERS[self.dtype]))
            flat[position : position + len(numbers)].copy_(numbers)
            position += len(numbers)


@dataclass(frozen=True, slots=True)
class StackedTensor:
    """Rows of tensors, one part after the other, as one tensor to write."""

    parts: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> str:
        """The dtype by the file's name for it."""
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape: all rows, and the other axes of any part."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(part.size for part in self.parts)

    def pieces(self) -> Iterator[bytes]:
        """Yield its bytes, at most `PIECE` at once."""
        for part in self.parts:
            yield from part.pieces()


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor in memory to write; it comes to the host when its turn has come, alone."""

    tensor: torch.Tensor

    @property
    def dtype(self) -> str:
        """The dtype by the file's name for it."""
        return _NAMES[str(self.tensor.dtype).removeprefix("torch.")]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return tuple(self.tensor.shape)

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.tensor.numel() * self.tensor.element_size()

    def pieces(self) -> Iterator[memoryview]:
        """Yield its bytes, at most `PIECE` at once."""
        import torch

        flat = self.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(flat), PIECE):
            yield flat[start : start + PIECE]


@dataclass(frozen=True, slots=True)
class InterpolatedTensor:
    """(1 - share) times a tensor plus share times another of its shape, in the dtype of the first.

    Computed in fp64, so that two equal numbers give the same number.
    """

    own: StoredTensor
    other: StoredTensor
    share: float

    @property
    def dtype(self) -> str:
        """The dtype by the file's name for it."""
        return self.own.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.own.shape

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.own.size

    def pieces(self) -> Iterator[memoryview]:
        """Yield its bytes, piece by piece."""
        import torch

        kind, at_once = getattr(torch, _NUMBERS[self.dtype]), PIECE // 8
        for first in range(0, self.own.count, at_once):
            count = min(at_once, self.own.count - first)
            own, other = (torch.empty(count, dtype=torch.float64) for _ in range(2))
            self.own.numbers(first, count).fill(own)
            self.other.numbers(first, count).fill(other)
            yield from LiveTensor(torch.lerp(own, other, self.share).to(kind)).pieces()


Writable = StoredTensor | StackedTensor | LiveTensor | InterpolatedTensor


def file_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file, in its own order.

    Raises:
        ModelError: it is not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}); copy the file again") from error
    length, header = _header(path)
    header.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def file_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a whole safetensors file."""
    return dict(_header(path)[1].get("__metadata__") or {})


def folder_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors that stock loading reads from a component's folder, of all its shards.

    Raises:
        ModelError: no weights, a shard missing or short, a tensor that the index places in another file, or that two
            shards hold.
    """
    weights = required_files(folder)
    index_files = index_positions(weights.index) if weights.index else None
    stored: dict[str, StoredTensor] = {}
    for file in weights.files:
        for name, tensor in file_tensors(file).items():
            if name in stored:
                raise ModelError(
                    f"{file}: tensor {name} is in {stored[name].file.name} too; expected it in one shard, copy all "
                    "of them again"
                )
            stored[name] = tensor
    if index_files is None or weights.name != DIFFUSERS:
        return stored
    return {name: stored[name] for name in index_files}  # diffusers goes by the index, transformers by the files


def index_positions(index: Path) -> dict[str, str]:
    """Return {tensor: file name} of a shard index whose files are there and hold what it says.

    Raises:
        ModelError: names the index or the shard.
    """
    files = weight_map(index)
    for name in sorted(set(files.values())):
        path = index.parent / name
        if not path.is_file():
            raise ModelError(f"{path}: missing; {index.name} names it; copy the shard again")
        lacking = sorted({tensor for tensor, file in files.items() if file == name} - set(file_tensors(path)))
        if lacking:
            raise ModelError(f"{path}: lacks tensor {lacking[0]}, which {index.name} places in it; copy both again")
    return files


def check_finite(path: Path) -> None:
    """Check that a file holds finite values only.

    Raises:
        ModelError: it does not; names the tensor.
    """
    import torch

    for name, tensor in file_tensors(path).items():
        if tensor.dtype not in _FLOATS:
            continue
        kind = getattr(torch, _FLOATS[tensor.dtype])
        for piece in tensor.pieces():
            numbers = torch.frombuffer(bytearray(piece), dtype=kind)
            if not bool(torch.isfinite(numbers.float() if numbers.itemsize == 1 else numbers).all()):
                raise ModelError(
                    f"{path}: tensor {name} holds values that are not finite; copy the file again "
                    "or go back to an earlier checkpoint"
                )


def write_tensors(folder: Path, tensors: Mapping[str, Writable], largest: int = LARGEST_SHARD) -> None:
    """Copy tensors, byte by byte and under new names, into `folder` as stock diffusers saves a model.

    One file, or shards of at most `largest` bytes with their index. Takes memory for one piece.
    """
    shards: list[dict[str, Writable]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(earlier.size for earlier in shards[-1].values()) + tensor.size > largest:
            shards.append({})
        shards[-1][name] = tensor
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{DIFFUSERS}.safetensors"
        if len(shards) > 1:
            file = f"{DIFFUSERS}-{number:05d}-of-{len(shards):05d}.safetensors"
        files |= dict.fromkeys(shard, file)
        write_file(folder / file, shard)
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (folder / f"{DIFFUSERS}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )


def write_model(
    target: Path, tensors: Mapping[str, Writable], config: Mapping[str, Any], largest: int = LARGEST_SHARD
) -> None:
    """Write the folder `target` of a stock model, whole or not at all: `write_tensors`, and `config.json`."""
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_tensors(work, tensors, largest)
    (work / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    move_in_place(work, target)


def write_file(
    path: Path,
    tensors: Mapping[str, Writable],
    metadata: Mapping[str, str] | None = None,
    beat: Callable[[], None] = lambda: None,
) -> str:
    """Copy tensors, byte by byte and under new names, into one file; return its SHA-256.

    Args:
        path: the file.
        tensors: name in the file -> tensor.
        metadata: of the file.
        beat: called after each piece, so that a long write shows signs of life.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # The widest numbers first, so that every tensor starts at a multiple of its numbers' width.
    ordered = sorted(tensors.items(), key=lambda item: -_width(item[1]))
    position = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    start = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(start)
    with path.open("wb") as out:
        out.write(start)
        for _, tensor in ordered:
            for piece in tensor.pieces():
                out.write(piece)
                digest.update(piece)
                beat()
    return digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the header's length in bytes, and the header."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, dict(json.loads(file.read(length)))


def _width(tensor: Writable) -> int:
    """Return the bytes of one number."""
    return tensor.size // max(math.prod(tensor.shape), 1)
