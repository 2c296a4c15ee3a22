from __future__ import annotations

import errno
from pathlib import Path

import pytest

from flcompress.files import append_line, write_text
from tests.fixtures.small_disk import fill, small_disk


def test_a_line_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        journal = disk / "journal.jsonl"
        before = "x" * 4089 + "\n"  # six bytes of its last page are left: a part of the line would fit
        journal.write_text(before)
        fill(disk)
        with pytest.raises(OSError, match="No space left on device") as caught:
            append_line(journal, "y" * 100)
        assert caught.value.errno == errno.ENOSPC
        assert journal.read_text() == before


def test_a_text_that_does_not_fit_leaves_the_old_one(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        file = disk / "run.json"
        write_text(file, "old\n")
        fill(disk, leave=4096)
        with pytest.raises(OSError, match="No space left on device"):
            write_text(file, "new\n" * 2000)
        assert file.read_text() == "old\n"
        assert sorted(path.name for path in disk.iterdir()) == ["ballast", "run.json"]


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    append_line(tmp_path / "journal.jsonl", "one")
    append_line(tmp_path / "journal.jsonl", "zwölf")
    assert (tmp_path / "journal.jsonl").read_text(encoding="utf-8") == "one\nzwölf\n"
