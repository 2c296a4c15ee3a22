"""Captions files: which video shows what, or prompts alone."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.errors import DataError

VIDEO_SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
_COLUMNS = ("file", "caption")


@dataclass(frozen=True, slots=True)
class Captioned:
    """One video and its text; `file` is relative to the folder of videos."""

    file: str
    caption: str


def read_captions(path: Path, videos: Path) -> list[Captioned]:
    """The videos that a captions file names, in its order.

    Args:
        path: `.jsonl`, one `{"file": "clip.mp4", "caption": "..."}` a line, or `.csv` with the header `file,caption`.
        videos: where the files lie.

    Raises:
        DataError: no such file or folder, another format, unknown columns, a file missing or named twice, no clip.
    """
    if not videos.is_dir():
        raise DataError(f"{videos}: no such folder; expected a folder of videos")
    found: dict[str, Captioned] = {}
    for line, record in _records(path):
        where = f"{path}:{line}"
        if not isinstance(record, dict) or not all(isinstance(record.get(column), str) for column in _COLUMNS):
            shown = json.dumps(record, ensure_ascii=False)[:60]
            raise DataError(f'{where}: {shown} given, expected {{"file": "clip.mp4", "caption": "..."}}')
        unknown = [key for key in record if key not in _COLUMNS]
        if unknown:
            raise DataError(f"{where}: column {unknown[0]!r} given, expected only file and caption; remove the others")
        file, caption = record["file"], record["caption"]
        if file in found:
            raise DataError(f"{where}: {file} is named twice; a video has one caption")
        if not (videos / file).is_file():
            raise DataError(f"{where}: {videos / file}: no such video; put it there or remove the line")
        found[file] = Captioned(file, caption)
    if not found:
        raise DataError(f"{path}: no clips; expected at least one line")
    return list(found.values())


def read_prompts(path: Path) -> list[str]:
    """The prompts of a `.txt` file, one a line, each once, in its order; DataError where it has none."""
    if path.suffix != ".txt":
        raise DataError(
            f"{path}: {path.suffix or 'no suffix'} given, expected .txt with one prompt a line for a dataset of "
            "prompts only; captions of videos need --videos FOLDER"
        )
    prompts = list(dict.fromkeys(line.strip() for line in _text(path).splitlines() if line.strip()))
    if not prompts:
        raise DataError(f"{path}: no prompts; expected one a line")
    return prompts


def without_caption(videos: Path, captioned: list[Captioned]) -> list[str]:
    """Video files under a folder that no caption names, relative to it."""
    named = {(videos / one.file).resolve() for one in captioned}
    files = (path for path in sorted(videos.rglob("*")) if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return [path.relative_to(videos).as_posix() for path in files if path.resolve() not in named]


def _records(path: Path) -> list[tuple[int, Any]]:
    """(line number, record) of a captions file."""
    text = _text(path)
    if path.suffix == ".jsonl":
        return [(n, _json(path, n, line)) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if path.suffix == ".csv":
        rows = csv.reader(io.StringIO(text, newline=""))
        header = next(rows, [])
        if sorted(header) != sorted(_COLUMNS):
            raise DataError(f"{path}:1: header {','.join(header)!r} given, expected file,caption")
        return [(rows.line_num, _columns(path, rows.line_num, header, row)) for row in rows if row]
    raise DataError(
        f"{path}: {path.suffix or 'no suffix'} given, expected .jsonl or .csv with file and caption"
        + ("; a .txt holds prompts only, without --videos" if path.suffix == ".txt" else "")
    )


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f'{path}:{number}: {line.strip()[:60]!r} given, expected {{"file": "clip.mp4", "caption": "..."}}'
        ) from error


def _columns(path: Path, line: int, header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) > len(header):
        raise DataError(f"{path}:{line}: {len(row)} columns given, expected file,caption; quote a caption with commas")
    return dict(zip(header, row, strict=False))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: no such captions file; expected .jsonl, .csv or .txt") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8") from error
