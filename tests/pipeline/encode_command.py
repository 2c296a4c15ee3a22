"""The command `flcompress encode`, and what lies in a folder."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from flcompress.cli import main


def arguments(model: Path, videos: Path, out: Path, *more: object) -> list[str]:
    given = ["encode", "--pipeline", model, "--videos", videos, "--captions", videos / "captions.jsonl", "--out", out,
             "--max-sequence-length", 16, *more]  # fmt: skip
    return list(map(str, given))


def encode(model: Path, videos: Path, out: Path, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(model, videos, out, *more))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
