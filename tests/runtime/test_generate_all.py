"""A clip for every prompt of a file: the clip that one command makes, over several processes, resumed, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.core.program import Program
from flcompress.core.records import ClipLine
from flcompress.exporters.diffusers_folder import DiffusersExporter
from flcompress.runtime import generate_all as room
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.clip_files import pixels_of
from flcompress.runtime.clip_folder import ClipFolder, read_frames, write_frames
from flcompress.runtime.generate import denoise, open_student, sample_clip
from tests.training import processes

pytestmark = pytest.mark.e2e

PROMPTS = ("a three drifting up", "ein Kreis\u2028und noch einer", "a/b: ../c")
"""With a sign that ends no line, and one that no file name may hold; the file names the first twice."""


@pytest.fixture(scope="module")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the diffusers export alone."""
    exports = tmp_path_factory.mktemp("exported") / "exports"
    (exports / "diffusers").mkdir(parents=True)
    DiffusersExporter().export(program, exports / "diffusers", exports, lambda *told: None)
    return exports.parent


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_bytes("\r\n".join([*PROMPTS[:2], "", PROMPTS[0], PROMPTS[2]]).encode())
    return path


@pytest.fixture(scope="module")
def made(run: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that one process makes."""
    out = tmp_path_factory.mktemp("made") / "new" / "clips"
    assert call(run, file, out) == (0, f"{out}\n", "")
    return out


def call(run: Path, file: Path, out: Path, *more: str) -> tuple[int, str, str]:
    given = ["generate", str(run), "--prompts", str(file), "--out", str(out), "--seed", "3", "--quiet", *more]
    done = CliRunner().invoke(main, given)
    return done.exit_code, done.stdout, done.stderr


def lines(out: Path) -> dict[str, ClipLine]:
    return {line.prompt: line for line in ClipFolder(out).lines().values()}


def clips(out: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in sorted(out.glob("*.mp4")))


def test_each_is_the_clip_of_its_prompt_at_the_seed(run: Path, made: Path, tmp_path: Path) -> None:
    told = lines(made)
    assert sorted(told) == sorted(PROMPTS)
    assert {line.seed for line in told.values()} == {3}
    assert sorted(path.name for path in made.glob("*.mp4")) == sorted(line.file for line in told.values())
    student = open_student(run, choose_backend("torch"), None)
    latents = denoise(student.network, student.parts, student.facts, PROMPTS[1], 3)
    write_frames(pixels_of(student.parts.decode_latents(latents)[0]), tmp_path / "alone.mp4", 16.0)
    own, other = ((made / told[prompt].file).read_bytes() for prompt in (PROMPTS[1], PROMPTS[0]))
    assert (own == (tmp_path / "alone.mp4").read_bytes()) != (own == other)


def test_what_is_there_stays_and_what_is_broken_is_made_again(
    run: Path, file: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed command leaves no half clip under its name; another seed has other names."""
    out = Path(shutil.copytree(made, tmp_path / "clips"))
    whole = dict(clips(made))
    lost, cut, _ = sorted(whole)
    (out / lost).unlink()
    (out / cut).write_bytes(whole[cut][:100])
    sampled: list[int] = []

    def counted(*given: object) -> object:
        sampled.append(1)
        return sample_clip(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "sample_clip", counted)
    assert call(run, file, out)[0] == 0
    assert (len(sampled), dict(clips(out))) == (2, whole)
    assert call(run, file, out)[0] == 0
    assert len(sampled) == 2, "nothing was missing"
    one = tmp_path / "one.txt"
    one.write_text(PROMPTS[0], encoding="utf-8")
    assert call(run, one, out, "--seed", "4")[0] == 0
    assert len(dict(clips(out))) == 4


@pytest.mark.slow
def test_two_processes_make_the_clips_of_one(run: Path, file: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    given: list[str | Path] = ["generate", run, "--prompts", file, "--out", out, "--seed", "3", "--quiet"]
    command = processes.run(given, tmp_path / "output", processes=2)
    assert [Path(f"{output}.out").read_text() for output in command.outputs] == [f"{out}\n", ""]
    assert [len(ClipLine.read_lines(out / f"manifest-{rank}.jsonl")) for rank in range(2)] == [2, 1]
    alone = dict(clips(made))
    for name, _ in clips(out):
        first, second = (read_frames(folder / name).astype(float) for folder in (out, made))
        assert np.abs(first - second).mean() < 1.0  # other threads round otherwise
    assert [name for name, _ in clips(out)] == list(alone)


def refused(run: Path, file: Path, out: Path, *more: str) -> str:
    status, stdout, stderr = call(run, file, out, *more)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1), stderr
    return stderr.removeprefix("error: ").rstrip("\n")


def test_refusals(run: Path, file: Path, made: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    out = tmp_path / "out"
    assert refused(run, empty, out) == f"{empty}: no prompts; expected one a line"
    assert refused(run, file, out, "--prompt", "a").startswith("generate: both of --prompt and --prompts given, expect")
    neither = CliRunner().invoke(main, ["generate", str(run), "--out", str(out)])
    assert (neither.exit_code, neither.stderr) == (
        2,
        "error: generate: neither of --prompt and --prompts given, expected one of them\n",
    )
    assert "given with --prompts, whose clips start from text" in refused(run, file, out, "--image", str(empty))
    assert not out.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").touch()
    assert refused(run, file, other).startswith(f"{other}: not empty, and not of flcompress generate (no clips.json)")
    assert (
        refused(run, file, empty)
        == f"{empty}: a file, expected a folder for the clips of --prompts; choose another --out"
    )


def test_clips_of_something_else_are_refused(run: Path, file: Path, made: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made, tmp_path / "clips"))
    before = dict(clips(out))
    assert refused(run, file, out, "--backend", "compile") == (
        f"{out}: holds clips of another backend: 'torch' there, 'compile' given; choose another --out"
    )
    assert "another options" in refused(run, file, out, "--precision", "bf16")
    assert "another frame rate: 16.0 there, 12.0 given" in refused(run, file, out, "--fps", "12")
    there = out / "clips.json"
    there.write_text(json.dumps({**json.loads(there.read_text()), "student": "0" * 64}))
    assert refused(run, file, out) == f"{out}: holds clips of another student; choose another --out"
    assert dict(clips(out)) == before
