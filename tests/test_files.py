from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import pytest

from flcompress.files import append_line, replacing, sha256, write_text
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


def test_a_line_cut_off_is_replaced_by_the_next(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    journal.write_text('{"step": 1}\n{"st')
    append_line(journal, '{"step": 2}')
    assert journal.read_text() == '{"step": 1}\n{"step": 2}\n'
    journal.write_text('{"step": 1}')
    append_line(journal, '{"step": 2}')
    assert journal.read_text() == '{"step": 1}\n{"step": 2}\n'
    journal.write_text('{"st')
    append_line(journal, '{"step": 2}')
    assert journal.read_text() == '{"step": 2}\n'


def test_a_replacement_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "shard.bin"
    file.write_bytes(b"old")
    writing = replacing(file)
    writing.__enter__().write_bytes(b"half of the n")
    assert writing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None) is False
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]
    with replacing(file) as temporary:
        temporary.write_bytes(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


def test_the_hash_of_a_file_shows_signs_of_life(tmp_path: Path) -> None:
    content = bytes(range(256)) * (1 << 17)
    (tmp_path / "weights").write_bytes(content)
    beats: list[None] = []
    assert sha256(tmp_path / "weights", lambda: beats.append(None)) == hashlib.sha256(content).hexdigest()
    assert len(beats) > 1
