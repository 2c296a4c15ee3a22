"""Typed access to the JSON files of a run directory; a damaged one gives a line that names the file and the place."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from flcompress.errors import FlcompressError
from flcompress.files import lines_of
from flcompress.stats import Interval


class ReportError(FlcompressError):
    """A file of the run directory is damaged, so there is nothing true to report from it."""


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object of `file`, found at `place` within it ("" is the top)."""

    file: Path
    values: Mapping[str, Any]
    place: str = ""

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; null counts as absent."""
        return self.values.get(key) is not None

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str):
            self._refuse(key, "a text")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not _is_number(value):
            self._refuse(key, "a number")
        return float(value)

    def numbers(self, key: str) -> list[float]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(_is_number(item) for item in value):
            self._refuse(key, "a list of numbers")
        return [float(item) for item in value]

    def rows(self, key: str, width: int) -> list[list[float]]:
        """A list of lists of `width` numbers."""
        value = self.values.get(key)
        good = isinstance(value, list) and all(
            isinstance(row, list) and len(row) == width and all(map(_is_number, row)) for row in value
        )
        if not isinstance(value, list) or not good:
            self._refuse(key, f"a list of rows of {width} numbers")
        return [[float(item) for item in row] for row in value]

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(key, "a list of texts")
        return list(value)

    def sub(self, key: str) -> Record:
        value = self.values.get(key)
        if not isinstance(value, dict):
            self._refuse(key, "an object")
        return Record(self.file, value, self._at(key))

    def each(self, key: str) -> list[Record]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            self._refuse(key, "a list of objects")
        return [Record(self.file, item, f"{self._at(key)}[{place}]") for place, item in enumerate(value)]

    def interval(self, key: str, mean: str = "mean") -> Interval:
        """Either a bare number, or an object with `mean` (bench files say "median"), "low" and "high"."""
        if _is_number(self.values.get(key)):
            value = self.number(key)
            return Interval(value, value, value)
        inner = self.sub(key)
        return Interval(inner.number(mean), inner.number("low"), inner.number("high"))

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def _refuse(self, key: str, expected: str) -> NoReturn:
        value = self.values.get(key)
        given = "nothing" if value is None else json.dumps(value, default=str)[:40]
        raise ReportError(f"{self.file}: {self._at(key)} is {given}, expected {expected}; make the file again")


def read_object(file: Path) -> Record:
    """The JSON object in `file`; ReportError where it cannot be read or is no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReportError(f"{file}: cannot be read as JSON ({error}); make the file again") from error
    if not isinstance(value, dict):
        raise ReportError(f"{file}: holds {type(value).__name__}, expected an object; make the file again")
    return Record(file, value)


def read_lines(file: Path) -> list[Record]:
    """The objects of a JSON-lines file, none where it is missing.

    The last line may be cut in half, as a killed run leaves it, and is then left out; any other bad line is an error.
    """
    if not file.is_file():
        return []
    try:
        lines = lines_of(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{file}: cannot be read ({error}); make the file again") from error
    found: list[Record] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ReportError(f"{file}: line {number} is not JSON ({error}); make the file again") from error
        if not isinstance(value, dict):
            raise ReportError(f"{file}: line {number} is {type(value).__name__}, expected an object")
        found.append(Record(file, value, f"line {number}"))
    return found


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
