"""MP4 files changed in their boxes, for what PyAV does not write."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

TRACK = (b"moov", b"trak")
SAMPLES = (*TRACK, b"mdia", b"minf", b"stbl", b"stsd")
H264 = (*SAMPLES, b"avc1")
_BEFORE_CHILDREN = {b"stsd": 8, b"avc1": 78}
"""Bytes of fields before the boxes inside one."""

MATRIX = struct.Struct(">9i")


def box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def put(path: Path, inside: Sequence[bytes], made: bytes) -> Path:
    """Put a box first inside another, instead of one of its kind there; sample data lie before `moov`, so stay."""
    data = bytearray(path.read_bytes())
    parents = _located(data, inside)
    start = parents[-1] + 8 + _BEFORE_CHILDREN.get(inside[-1], 0)
    end = parents[-1] + _size(data, parents[-1])
    old = [at for name, at in _children(data, start, end) if name == made[4:8]]
    where, length = (old[0], _size(data, old[0])) if old else (start, 0)
    if not old and inside[-1] == TRACK[-1]:
        where += _size(data, start)  # the track's header stays its first
    data[where : where + length] = made
    for at in parents:
        struct.pack_into(">I", data, at, _size(data, at) + len(made) - length)
    path.write_bytes(data)
    return path


def edit_list(edits: Sequence[tuple[int, int]]) -> bytes:
    """(duration in the film's time scale, start in the track's or -1 for nothing) each."""
    rows = b"".join(struct.pack(">Iihh", duration, start, 1, 0) for duration, start in edits)
    return box(b"edts", box(b"elst", struct.pack(">II", 0, len(edits)) + rows))


def turn(path: Path, matrix: Sequence[int]) -> Path:
    """Write a display matrix into the track's header."""
    data = bytearray(path.read_bytes())
    (_, _, header) = _located(data, (*TRACK, b"tkhd"))
    MATRIX.pack_into(data, header + 8 + 40, *matrix)
    path.write_bytes(data)
    return path


def _located(data: bytes | bytearray, names: Sequence[bytes]) -> list[int]:
    """Where each of nested boxes starts."""
    found, start, end = [], 0, len(data)
    for name in names:
        at = next(at for kind, at in _children(data, start, end) if kind == name)
        found.append(at)
        start, end = at + 8 + _BEFORE_CHILDREN.get(name, 0), at + _size(data, at)
    return found


def _children(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[bytes, int]]:
    while start < end:
        yield bytes(data[start + 4 : start + 8]), start
        start += _size(data, start)


def _size(data: bytes | bytearray, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")
