"""What every record is: a frozen model that is read with one-line errors and written as it was built."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flcompress.core.records.faults import fault_in
from flcompress.errors import RecordError, RequestError
from flcompress.files import lines_of, write_text
from flcompress.models.configs import read_json
from flcompress.wording import newer_format

FORMAT = 1
"""Newest format of these files that this version reads; files without the key `format` have format 1."""

Fields = Mapping[str, Any]


class Part(BaseModel):
    """An object inside a record."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Part):
    """One JSON file, or one line of a JSON-lines file."""

    FIX: ClassVar[str] = "make the file again"
    format: Annotated[int, Field(exclude=True)] = 1

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the record in `file`.

        Raises:
            RecordError: unreadable, damaged, or written by a newer flcompress.
        """
        try:
            text = file.read_text(encoding="utf-8")
            value = json.loads(text)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecordError(f"{file}: cannot be read as JSON ({error}); {cls.FIX}") from error
        return cls.parse(text, value, str(file))

    @classmethod
    def read_named(cls, file: Path, why: str, fix: str) -> Self:
        """Return the record in a file of a folder that the user names.

        Args:
            file: the file.
            why: who needs it, for the message where there is none.
            fix: what to do about a damaged one.

        Raises:
            RequestError: no such file, damaged, or written by a newer flcompress.
        """
        value = read_json(file, why, fix)
        try:
            return cls.parse(json.dumps(value), value, str(file), fix)
        except RecordError as error:
            raise RequestError(str(error)) from error

    @classmethod
    def read_optional(cls, file: Path) -> Self | None:
        """Return the record in `file`, or None if there is no such file."""
        return cls.read(file) if file.is_file() else None

    @classmethod
    def read_lines(cls, file: Path) -> list[Self]:
        """Return the records of a JSON-lines file; none if there is no such file.

        A last line that a killed run left incomplete is skipped; any other bad line is a RecordError.
        """
        if not file.is_file():
            return []
        try:
            lines = lines_of(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{file}: cannot be read ({error}); {cls.FIX}") from error
        records: list[Self] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break
                raise RecordError(f"{file}: line {number} is not JSON ({error}); {cls.FIX}") from error
            records.append(cls.parse(line, value, f"{file}: line {number}"))
        return records

    @classmethod
    def parse(cls, text: str, value: object, where: str, fix: str = "") -> Self:
        """Check one JSON text, which `value` is decoded from.

        Args:
            text: the file, or a line of it.
            value: what it holds.
            where: what an error's message begins with.
            fix: what it ends with; the record's own fix by default.

        Raises:
            RecordError: an unknown or missing key, a value of another type, or a newer format.
        """
        fix = fix or cls.FIX
        if not isinstance(value, dict):
            raise RecordError(f"{where}: holds {type(value).__name__}, expected an object; {fix}")
        written = value.get("format", 1)
        if isinstance(written, int) and written > FORMAT:
            raise RecordError(f"{where}: {newer_format(written, FORMAT)}")
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            raise RecordError(f"{where}: {fault_in(error, cls, value)}; {fix}") from error

    def dump(self) -> dict[str, Any]:
        """Return the plain JSON object: the keys that were set, in the order of the fields."""
        return self.model_dump(mode="json", exclude_unset=True)

    def write(self, file: Path, *, indent: int | None = 1) -> None:
        """Write the file in one piece; ValueError for a number that is not finite."""
        write_text(file, json.dumps(self.dump(), indent=indent, allow_nan=False) + "\n")

    def line(self) -> str:
        """Return the record as one line of a JSON-lines file."""
        return json.dumps(self.dump())


AnyRecord = TypeVar("AnyRecord", bound=Record)


class OpenRecord(Record):
    """A record to which passes, exporters and plug-ins add keys of their own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def more(self) -> Fields:
        """The keys that are not fields."""
        return self.model_extra or {}
