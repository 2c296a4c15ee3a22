"""Whatever the operating system refuses ends in one line, by every command, before any work where it can be known."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from safetensors import SafetensorError

from flcompress.errors import FlcompressError, RequestError
from flcompress.files import Lock, locked, sync, working_alone
from flcompress.system_errors import check_writable, system_errors_in_one_line
from tests.cli.test_cli import cli
from tests.fixtures.fakes import CALLS
from tests.fixtures.recipes import WriteRecipe
from tests.fixtures.small_disk import small_disk

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("fake_steps")]


def refused(done: Result, *named: str, status: int = 2) -> None:
    assert done.exit_code == status, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for text in named:
        assert text in done.stderr


@pytest.fixture
def finished(write: WriteRecipe, tmp_path: Path) -> Path:
    run = tmp_path / "finished"
    assert cli("apply", write("passes: [score]\nexports: [text]\n"), "--run-dir", run, "--quiet").exit_code == 0
    CALLS.clear()
    return run


WRITING = {
    "apply": ("apply", "RECIPE", "--run-dir", "OUT", "--quiet"),
    "encode": ("encode", "--pipeline", "MODEL", "--captions", "PROMPTS", "--out", "OUT", "--quiet"),
    "generate": ("generate", "RUN", "--prompt", "a one", "--out", "OUT/clip.gif", "--quiet"),
    "inspect": ("inspect", "MODEL", "--out", "OUT/graph.svg"),
    "remap-lora": ("remap-lora", "LORA", "RUN", "--out", "OUT/lora.safetensors"),
}


@pytest.fixture
def place(write: WriteRecipe, tmp_path: Path, model: Path, finished: Path) -> dict[str, str]:
    (tmp_path / "prompts.txt").write_text("a one\n")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    return {
        "RECIPE": str(write("passes: [score]\n")),
        "MODEL": str(model),
        "PROMPTS": str(tmp_path / "prompts.txt"),
        "LORA": str(tmp_path / "lora.safetensors"),
        "RUN": str(finished),
    }


def given(command: str, place: dict[str, str], out: Path) -> list[str]:
    return [
        place.get(word) or (str(out) + word.removeprefix("OUT") if word.startswith("OUT") else word)
        for word in WRITING[command]
    ]


@pytest.mark.parametrize("command", WRITING)
def test_a_place_below_a_file(command: str, place: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder\n")
    refused(cli(*given(command, place, tmp_path / "data" / "deep" / "set")), str(tmp_path / "data"))
    assert (tmp_path / "data").read_text() == "not a folder\n"
    assert CALLS == []


@pytest.mark.parametrize("command", WRITING)
def test_a_name_that_is_too_long(command: str, place: dict[str, str], tmp_path: Path) -> None:
    refused(cli(*given(command, place, tmp_path / ("n" * 300))), "File name too long")
    assert CALLS == []


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "there").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield disk / "there"


@pytest.mark.parametrize("command", WRITING)
def test_a_disk_that_may_not_be_written(command: str, place: dict[str, str], read_only: Path) -> None:
    refused(cli(*given(command, place, read_only / "set")), "Read-only file system", str(read_only))
    assert CALLS == []


@pytest.mark.parametrize("command", ["report", "export", "eval", "bench"])
def test_a_run_that_may_not_be_written(command: str, finished: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 16) as disk:
        run = disk / "run"
        finished.rename(tmp_path / "kept")
        subprocess.run(["cp", "-r", str(tmp_path / "kept"), str(run)], check=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused(cli(command, run), f"error: {run}: Read-only file system")


@pytest.mark.parametrize("command", ["report", "export", "eval", "bench"])
def test_a_run_that_is_not_there_is_no_matter_of_permissions(command: str, read_only: Path) -> None:
    refused(cli(command, read_only / "misspelt"), f"{read_only}/misspelt", "run directory")


def test_a_dry_run_writes_nothing_so_may_be_anywhere(write: WriteRecipe, read_only: Path) -> None:
    done = cli("apply", write("passes: [score]\n"), "--run-dir", read_only / "run", "--dry-run")
    assert done.exit_code == 0, done.output


def test_a_recipe_that_is_a_folder(tmp_path: Path) -> None:
    refused(cli("apply", tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (
            OSError(errno.ENOSPC, "", "a"),
            FlcompressError,
            "there: no space left on the disk; what was stored before is",
        ),
        (OSError(errno.EDQUOT, ""), FlcompressError, "there: no space left on the disk"),
        (OSError(errno.EROFS, "", "a"), RequestError, "a: Read-only file system; make it writable, or choose another"),
        (OSError(errno.EPERM, "", "a"), RequestError, "a: Operation not permitted; change its permissions"),
        (OSError(errno.ENOTDIR, "", "a"), RequestError, "a: Not a directory; a part of this path is a file"),
        (
            OSError(errno.EISDIR, "", "a"),
            RequestError,
            "a: Is a directory; a folder given, expected the name of a file",
        ),
        (OSError(errno.ELOOP, "", "a"), RequestError, "a: Too many levels of symbolic links"),
        (OSError(errno.EXDEV, "", "a", None, "b"), RequestError, "b: Invalid cross-device link"),
        (OSError(errno.EIO, "", b"a"), FlcompressError, "a: Input/output error; check the disk"),
        (OSError(errno.ESTALE, "", "a"), FlcompressError, "a: Stale file handle"),
        (OSError(errno.EMFILE, "", "a"), FlcompressError, "a: Too many open files; raise the limit"),
        (OSError(errno.ETIMEDOUT, "", "a"), FlcompressError, "a: Connection timed out; give the same command again"),
        (OSError("broken\n data stream"), FlcompressError, "broken data stream"),
        (SafetensorError("Error: I/O error: x (os error 13)"), RequestError, "there: Permission denied; change its"),
        (SafetensorError("Error: I/O error: x (os error 28)"), FlcompressError, "there: no space left on the disk"),
        (
            UnicodeEncodeError("ascii", "é", 0, 1, ""),
            RequestError,
            r"'\xe9': cannot be written in this system's encoding (ascii)",
        ),
    ],
)
def test_every_kind(error: Exception, kind: type[FlcompressError], text: str) -> None:
    with pytest.raises(FlcompressError) as caught, system_errors_in_one_line(Path("there")):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value).startswith(text)
    assert "\n" not in str(caught.value)


def test_what_is_no_error_of_the_system_stays(tmp_path: Path) -> None:
    for error in (SafetensorError("header too large"), BrokenPipeError(errno.EPIPE, "")):
        with pytest.raises(type(error)) as caught, system_errors_in_one_line():
            raise error
        assert caught.value is error


def test_a_place_is_writable_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "deep")
    check_writable(Path("relative"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError) as caught:
        check_writable(tmp_path / "new" / "deep")
    assert caught.value.filename == str(tmp_path)


def test_a_terminal_without_the_sign(finished: Path, tmp_path: Path) -> None:
    """The run's name has a sign that ASCII lacks; both the summary and the path of the report are printed."""
    run = tmp_path / "modèle"
    finished.rename(run)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "flcompress", "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert r"mod\xe8le" in done.stdout.replace("\n", "")  # however long the path, which is wrapped
    assert (run / "report.html").is_file()


def without_locks(number: int) -> object:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks(
    number: int, write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lustre without -o flock, NFS, FUSE: the work is done, it is said once, and nobody's work is removed."""
    monkeypatch.setattr(fcntl, "flock", without_locks(number))
    run = tmp_path / "run"
    others = run / "passes" / ".work-01-score-0123456789ab"
    others.mkdir(parents=True)
    done = cli("apply", write("passes: [score]\n"), "--run-dir", run)
    assert done.exit_code == 0, done.output
    assert done.stderr.count(f"{run}: this file system has no locks (flock)") == 1
    assert others.is_dir()


def test_a_lock_that_fails_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path, wait=False):
        pass


def test_one_at_a_time(tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path, wait=False) as lock:
        assert lock is Lock.HELD
        with pytest.raises(RequestError, match="busy"), working_alone(tmp_path, "busy", said.append):
            pass
    with working_alone(tmp_path, "busy", said.append):
        pass
    assert said == []


def test_a_folder_that_cannot_be_synchronised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems refuse fsync of a folder; that of a file must work."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
