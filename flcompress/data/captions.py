"""Captions files: the text of every video, or prompts alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flcompress.data.video_names import VIDEO_SUFFIXES, VideoFolder, duplicate_links, name_pair, printable
from flcompress.errors import DataError, RequestError
from flcompress.files import lines_of

_COLUMNS = ("file", "caption")
_EXPECTED = 'expected {"file": "clip.mp4", "caption": "..."}'


@dataclass(frozen=True, slots=True)
class CaptionedVideo:
    """A video and its caption.

    Attributes:
        file: name relative to the folder of videos, as it is spelled there.
        caption: text.
        written: name in the captions file, if it is spelled differently.
    """

    file: str
    caption: str
    written: str | None = None


def read_captions(path: Path, videos: Path) -> list[CaptionedVideo]:
    """Return the videos that a captions file names, in its order.

    Args:
        path: `.jsonl`, one `{"file": "clip.mp4", "caption": "..."}` a line, or `.csv` with the header `file,caption`.
        videos: the folder of the files.

    Raises:
        DataError: no such file or folder, another format, unknown columns, a file missing or named twice, no clip.
    """
    folder = VideoFolder(videos)
    clips: dict[str, tuple[int, CaptionedVideo]] = {}
    for line, record, shown in _records(path):
        where = f"{path}:{line}"
        if not isinstance(record, dict) or not all(isinstance(record.get(column), str) for column in _COLUMNS):
            raise DataError(f"{where}: {shown[:60]} given, {_EXPECTED}")
        unknown = [key for key in record if key not in _COLUMNS]
        if unknown:
            raise DataError(f"{where}: column {unknown[0]!r} given, expected only file and caption; remove the others")
        for column in _COLUMNS:
            _check_text(where, column, record[column])
        clip = _find_video(where, record["file"], record["caption"], folder)
        if clip.file in clips:
            first, other = clips[clip.file]
            spelled = (clip.written, other.written) != (None, None)
            hint = f", as {printable(other.written or other.file)} in line {first}" if spelled else ""
            raise DataError(f"{where}: {printable(record['file'])} is named twice{hint}; a video has one caption")
        clips[clip.file] = line, clip
    if not clips:
        raise DataError(f"{path}: no clips; expected at least one line")
    return [clip for _, clip in clips.values()]


def read_prompts(path: Path) -> list[str]:
    """Return the distinct prompts of a `.txt` file, one per line, in order; DataError if there are none."""
    if path.suffix != ".txt":
        raise DataError(
            f"{path}: {path.suffix or 'no suffix'} given, expected .txt with one prompt a line for a dataset of "
            "prompts only; captions of videos need --videos FOLDER"
        )
    prompts = list(dict.fromkeys(line.strip() for _, line in _lines(path)))
    if not prompts:
        raise DataError(f"{path}: no prompts; expected one a line")
    return prompts


def check_prompt(where: str, text: str) -> None:
    """Raise RequestError for a prompt that is no Unicode text, as a command line of other bytes gives it."""
    sign = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
    if sign is None:
        return
    code = ord(sign)
    what = f"byte 0x{code - 0xDC00:02x} is not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"half of a sign (\\u{code:04x})"
    raise RequestError(f"{where}: {what}; give the prompt in UTF-8")


def videos_without_caption(videos: Path, captioned: list[CaptionedVideo]) -> list[str]:
    """Return the video files under a folder that no caption names, relative to it."""
    named = {(videos / clip.file).resolve() for clip in captioned}
    files = [name for name in VideoFolder(videos).names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    return [name for name in files if (videos / name).resolve() not in named]


def name_remarks(videos: Path, captioned: list[CaptionedVideo]) -> list[str]:
    """Return remarks on names spelled unlike their files', and on files that have several names."""
    remarks = []
    written = [(clip.written, clip.file) for clip in captioned if clip.written is not None]
    if written:
        remarks.append(
            f"{len(written):,} names are written otherwise than the files'; the first: {name_pair(*written[0])}"
        )
    links = duplicate_links(videos, [clip.file for clip in captioned])
    if links:
        remarks.append(
            f"{len(links):,} videos are links to others that have a caption too; the first: {name_pair(*links[0])}"
        )
    return remarks


def _find_video(where: str, file: str, caption: str, folder: VideoFolder) -> CaptionedVideo:
    try:
        name = folder.find(file)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return CaptionedVideo(name, caption, None if name == file else file)


def _check_text(where: str, column: str, text: str) -> None:
    """Raise DataError for text that is empty, or that no tokenizer or file system accepts."""
    half = next((sign for sign in text if "\ud800" <= sign <= "\udfff"), None)
    if half:
        raise DataError(
            f"{where}: {column}: half of a sign (\\u{ord(half):04x}), of two that belong together; write both"
        )
    if "\0" in text:
        raise DataError(f"{where}: {column}: a NUL character; remove it")
    if not text.strip():
        raise DataError(f"{where}: {column}: empty; write one, or remove the line")


def _records(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield (line number, record, its text) of a captions file."""
    if path.suffix == ".jsonl":
        yield from ((number, _json(f"{path}:{number}", line), line.strip()) for number, line in _lines(path))
    elif path.suffix == ".csv":
        yield from _rows(path)
    else:
        _text(path)
        raise DataError(
            f"{path}: {path.suffix or 'no suffix'} given, expected .jsonl or .csv with file and caption"
            + ("; a .txt holds prompts only, without --videos" if path.suffix == ".txt" else "")
        )


def _json(where: str, line: str) -> Any:
    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            twice = next(key for key in record if sum(key == other for other, _ in pairs) > 1)
            raise DataError(f"{where}: {twice!r} given twice; remove one of them")
        return record

    try:
        return json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, thousands of brackets
        raise DataError(f"{where}: {line.strip()[:60]!r} given, {_EXPECTED}") from error


def _rows(path: Path) -> Iterator[tuple[int, Any, str]]:
    """Yield the rows of a CSV file, numbered by their first line: a quoted caption may span several."""
    rows = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: {error}; close every quote, and write a quote within quotes twice"
            ) from error
        if header is None:
            header = row
            if sorted(header) != sorted(_COLUMNS):
                raise DataError(f"{path}:1: header {','.join(header)!r} given, expected file,caption")
        elif len(row) > len(header):
            raise DataError(
                f"{path}:{line}: {len(row)} columns given, expected file,caption; quote a caption with commas"
            )
        elif row:
            record = dict(zip(header, row, strict=False))
            yield line, record, json.dumps(record, ensure_ascii=False)
    if header is None:
        raise DataError(f"{path}:1: header '' given, expected file,caption")


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the non-blank lines of a file."""
    lines = list(enumerate(lines_of(_text(path)), start=1))
    for number, line in lines:
        if "\r" in line:
            raise DataError(f"{path}:{number}: a carriage return within the line; end lines with a newline")
    return [(number, line) for number, line in lines if line.strip()]


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such captions file; expected .jsonl, .csv or .txt") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected .jsonl, .csv or .txt") from error
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = "UTF-16" if wide else f"not UTF-8 (byte 0x{data[error.start]:02x})"
        raise DataError(f"{path}:{line}: {what}; save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: a NUL character, as UTF-16 has them; save it as UTF-8 without")
    return text
