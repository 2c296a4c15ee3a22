"""The files of a folder of videos, found by names that people and programs write in several ways."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from flcompress.errors import DataError

VIDEO_SUFFIXES = frozenset({".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})


class VideoFolder:
    """Every file under a folder, by its name relative to it, with slashes.

    Attributes:
        folder: where they lie.
        names: in order; files in folders that are links are not among them, but are found.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected a folder of videos")
        self.folder = folder
        self.names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        self._exact = {name: [name] for name in self.names}

    def find(self, name: str) -> str:
        """The name of the file that `name` means: its own, or that of the only file whose name is written otherwise.

        Written otherwise are: "./a" and "b//a", an absolute path into the folder, accents as one sign or as two,
        capitals, backslashes between folders, percent signs as in addresses.

        Raises:
            DataError: no such file, several, or one outside of the folder.
        """
        shown = printable(str(self.folder / name))
        relative = Path(os.path.relpath(os.path.abspath(self.folder / name), os.path.abspath(self.folder))).as_posix()  # noqa: PTH100 (links are not followed)
        if relative.split("/")[0] == "..":
            raise DataError(f"{shown}: outside of {self.folder}; put it there, or give --videos a folder above both")
        otherwise = (posixpath.normpath(one) for one in (relative.replace("\\", "/"), unquote(relative)))
        for written in dict.fromkeys((relative, *otherwise)):
            for form, known in ((str, self._exact), (_composed, self._composed), (_caseless, self._caseless)):
                same = known.get(form(written), [])
                if len(same) > 1:
                    several = " and ".join(map(printable, same[:2]))
                    raise DataError(f"{shown}: no such video, but {several} are; name one of them as it is written")
                if same:
                    return same[0]
        if self._is_file(relative):
            return relative
        raise DataError(f"{shown}: no such video; put it there or remove the line")

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # a name that is too long, or none at all
            return False

    @cached_property
    def _composed(self) -> Mapping[str, list[str]]:
        return _grouped(self.names, _composed)

    @cached_property
    def _caseless(self) -> Mapping[str, list[str]]:
        return _grouped(self.names, _caseless)


def linked(folder: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, first name) of files that have several names, by links."""
    first: dict[tuple[int, int], str] = {}
    pairs = []
    for name in names:
        stat = (folder / name).stat()
        known = first.setdefault((stat.st_dev, stat.st_ino), name)
        if known != name:
            pairs.append((name, known))
    return pairs


def both(written: str, name: str) -> str:
    """Two names of a file for people; in ASCII where they look alike."""
    if _composed(written) == _composed(name):
        return f"{written!a} is {name!a}"
    return f"{printable(written)} is {printable(name)}"


def in_utf8(name: str) -> str:
    """A name that can be written to a file of text: a byte that is not UTF-8 as an escape."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable(name: str) -> str:
    """A name in one line: a newline, and whatever else a terminal does not show, as an escape."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    """Equal for names that differ in capitals, or in how accents are written: Unicode's canonical caseless matching."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _grouped(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(form(name), []).append(name)
    return found
