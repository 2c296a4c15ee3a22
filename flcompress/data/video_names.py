"""Look up the files of a folder of videos by names that people and programs spell in several ways."""

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
    """The files under a folder, by their names relative to it, with slashes.

    Attributes:
        folder: the folder.
        names: sorted names; files in linked folders are not listed, but `find` finds them.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected a folder of videos")
        self.folder = folder
        self.names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        self._exact = {name: [name] for name in self.names}

    def find(self, name: str) -> str:
        """Return the name of the file that `name` means: an exact match, or the only file that differs in spelling.

        Accepted spellings: "./a" and "b//a", an absolute path into the folder, composed or decomposed accents, other
        capitals, backslashes between folders, percent escapes as in URLs.

        Raises:
            DataError: no such file, several, or one outside of the folder.
        """
        shown = printable(str(self.folder / name))
        relative = Path(os.path.relpath(os.path.abspath(self.folder / name), os.path.abspath(self.folder))).as_posix()  # noqa: PTH100 (links are not followed)
        if relative.split("/")[0] == "..":
            raise DataError(f"{shown}: outside of {self.folder}; put it there, or give --videos a folder above both")
        variants = (posixpath.normpath(spelling) for spelling in (relative.replace("\\", "/"), unquote(relative)))
        for written in dict.fromkeys((relative, *variants)):
            for form, known in ((str, self._exact), (_composed, self._composed), (_caseless, self._caseless)):
                matches = known.get(form(written), [])
                if len(matches) > 1:
                    several = " and ".join(map(printable, matches[:2]))
                    raise DataError(f"{shown}: no such video, but {several} are; name one of them as it is written")
                if matches:
                    return matches[0]
        if self._is_file(relative):
            return relative
        raise DataError(f"{shown}: no such video; put it there or remove the line")

    def _is_file(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # a name that is too long or invalid
            return False

    @cached_property
    def _composed(self) -> Mapping[str, list[str]]:
        return _group(self.names, _composed)

    @cached_property
    def _caseless(self) -> Mapping[str, list[str]]:
        return _group(self.names, _caseless)


def duplicate_links(folder: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (name, first name) of files that links give several names."""
    first: dict[tuple[int, int], str] = {}
    pairs = []
    for name in names:
        stat = (folder / name).stat()
        known = first.setdefault((stat.st_dev, stat.st_ino), name)
        if known != name:
            pairs.append((name, known))
    return pairs


def name_pair(written: str, name: str) -> str:
    """Return two names of a file as text; in ASCII if they look alike."""
    if _composed(written) == _composed(name):
        return f"{written!a} is {name!a}"
    return f"{printable(written)} is {printable(name)}"


def in_utf8(name: str) -> str:
    """Return a name that can be written as UTF-8: undecodable bytes become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def printable(name: str) -> str:
    """Return a name on one line: newlines and other unprintable characters become escapes."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _caseless(name: str) -> str:
    """Return a key for Unicode's canonical caseless matching: equal across case and composition of accents."""
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def _group(names: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(form(name), []).append(name)
    return groups
