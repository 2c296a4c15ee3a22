"""`flcompress encode` given again: nothing lost or done twice when it was ended, nothing of another's overwritten."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flcompress.data import encoder
from flcompress.data.dataset import LatentDataset
from flcompress.data.encoder import ClipTask, Encoder, PromptTask, ShardResult
from flcompress.data.index import Index
from flcompress.data.workers import workers
from flcompress.errors import DataError, FlcompressError
from tests.fixtures.encode_command import arguments, contents, encode
from tests.fixtures.video_files import write_video
from tests.training import processes

pytestmark = pytest.mark.e2e


def test_nothing_to_do_the_second_time(encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path) -> None:
    out, _ = encoded
    before = contents(out)
    again = encode(model, videos, out)
    assert again.exit_code == 0, again.output
    assert again.stdout.splitlines()[-2:] == [
        f"5 videos skipped: {out}/skipped.jsonl says why", "nothing to do: every shard is there and whole"]  # fmt: skip
    assert contents(out) == before


def test_only_a_damaged_shard_is_made_again(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(encoded[0], out)
    before = contents(out)
    damaged = out / "clips-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (out / "prompts-00000.safetensors").unlink()
    mended = encode(model, videos, out, "--json", "--quiet")
    assert json.loads(mended.stdout)["made"] == 2
    assert contents(out) == before


def test_a_damaged_shard_of_version_1_is_made_again_in_its_layout(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the index, whose hash is part of the keys of all results on this dataset, stays as it was."""
    out = tmp_path / "out"
    with monkeypatch.context() as earlier:
        earlier.setattr(encoder, "compact", lambda family, tensors: dict(tensors))
        assert encode(model, videos, out, "--quiet").exit_code == 0
    index = out / "index.json"
    index.write_text(index.read_text().replace('"version": 2', '"version": 1'))
    before = contents(out)
    (out / "prompts-00000.safetensors").unlink()
    assert json.loads(encode(model, videos, out, "--json", "--quiet").stdout)["made"] == 1
    assert contents(out) == before


def children(pid: int) -> list[int]:
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in pids]


def test_an_interrupted_command_goes_on(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", Encoder.make
    made: list[str] = []

    def make_two(self: Encoder, task: PromptTask | ClipTask) -> ShardResult:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.file)
        return real(self, task)

    monkeypatch.setattr(Encoder, "make", make_two)
    stopped = encode(model, videos, out, "--quiet")
    assert stopped.exit_code == 130
    assert stopped.stderr == "interrupted; the same command resumes from here\n"
    with pytest.raises(DataError, match="an unfinished latent dataset; give the same flcompress encode again"):
        LatentDataset.load(out)
    refused = encode(model, videos, out, "--frames", 5)
    assert "holds a dataset made from another request (other target)" in refused.stderr

    monkeypatch.undo()
    # What a power cut can leave beside: half a line, a shard that never reached the disk, a file half written.
    done_file = out / ".encoding" / "done.jsonl"
    with done_file.open("a") as file:
        file.write('{"task": "clips-0000')
    done_file.rename(done_file.with_name("done-1.jsonl"))  # as the second process of a launcher leaves it
    (out / made[0]).unlink()
    (out / ".clips-00001.safetensors.tmp").write_bytes(b"half")
    done = encode(model, videos, out, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["made"] == 2
    assert contents(out) == contents(encoded[0])


@pytest.mark.slow
def test_the_processes_of_a_launcher_write_the_bytes_of_one(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path
) -> None:
    """Each encodes its share, the broken videos too, and the main one writes the index and prints."""
    out = tmp_path / "out"
    command = processes.run(arguments(model, videos, out, "--json", "--quiet"), tmp_path / "output", processes=2)
    first, second = (Path(f"{output}.out").read_text() for output in command.outputs)
    assert (json.loads(first), second) == ({**encoded[1], "out": str(out)}, "")
    assert contents(out) == contents(encoded[0])
    for damaged in ("prompts-00000.safetensors", "clips-00000.safetensors"):
        (out / damaged).write_bytes(b"damaged")
    command = processes.run(arguments(model, videos, out, "--json", "--quiet"), tmp_path / "output", processes=2)
    assert json.loads(Path(f"{command.outputs[0]}.out").read_text())["made"] == 2
    assert contents(out) == contents(encoded[0])


def test_workers_and_a_launcher_exclude_each_other(
    model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    refused = encode(model, videos, tmp_path / "out", "--workers", 3)
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: --workers: 3 given, but the launcher started 2 processes, which share the work; leave it out\n",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_killed_and_one_that_goes_on_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    rows = []
    for number in range(16):
        width = 24 + 8 * number  # each a shard of its own
        write_video(folder / f"{number}.mp4", height=32, width=width, seed=number)
        rows.append(json.dumps({"file": f"{number}.mp4", "caption": f"a {number}"}))
    broken = folder / "1.mp4"
    start = (data := bytearray(broken.read_bytes())).index(b"mdat")
    data[start + 600 : start + 900] = bytes(300)
    broken.write_bytes(data)
    (folder / "captions.jsonl").write_text("\n".join(rows))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert encode(model, folder, whole, "--quiet").exit_code == 0

    done = killed / ".encoding" / "done.jsonl"
    command = [sys.executable, "-m", "flcompress", *arguments(model, folder, killed, "--workers", 2, "--quiet")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not (done.exists() and done.read_text().count("\n") >= 4):
            time.sleep(0.005)
        workers = children(running.pid)
        running.kill()
    assert not (killed / "index.json").exists(), "it was over before it could be killed"
    assert workers
    deadline = time.monotonic() + 300
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), "workers outlive a killed command"

    left = len(Index.read(whole).shards) - done.read_text().count("\n")
    again = encode(model, folder, killed, "--json", "--quiet")
    assert again.exit_code == 0, again.output
    assert 0 < json.loads(again.stdout)["made"] <= left + 1  # the list of what is done begins with an empty line
    assert contents(killed) == contents(whole)
    assert json.loads((whole / "skipped.jsonl").read_text())["file"] == "1.mp4"


def test_another_dataset_is_not_overwritten(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path
) -> None:
    out, _ = encoded
    before = contents(out)
    for more, difference in (
        (["--frames", 5], "other target"),
        (["--max-sequence-length", 8], "max_sequence_length: 16 there, 8 given"),
        (["--fps", 4], "fps: None there, 4.0 given"),
    ):
        refused = encode(model, videos, out, *more)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"error: {out}: holds a dataset made from another request ({difference}); choose another --out\n"
        )
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    refused = encode(model, videos, tmp_path / "full")
    assert refused.stderr == (
        f"error: {tmp_path}/full: not empty and no latent dataset (no index.json); choose another --out\n"
    )
    refused = encode(model, videos, tmp_path / "full" / "thesis.tex")
    assert refused.stderr == f"error: {tmp_path}/full/thesis.tex: a file, expected a folder; choose another --out\n"


def test_two_at_once_are_refused(encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path) -> None:
    import fcntl

    out, _ = encoded
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        refused = encode(model, videos, out)
    finally:
        os.close(descriptor)
    assert refused.exit_code == 2
    assert refused.stderr == f"error: {out}: another flcompress is encoding into this folder; wait for it\n"


def test_a_worker_that_dies_ends_the_command(model: Path, videos: Path, tmp_path: Path) -> None:
    encoder = Encoder({"_class_name": "WanPipeline"}, {}, "cpu", 16, tmp_path, videos, resize=False, fps=None)
    with (
        pytest.raises(FlcompressError, match=r"a worker process was ended from outside \(out of memory\?\)"),
        workers(encoder, 2) as run,
    ):
        list(run(end_this_process, [1]))


def end_this_process(encoder: object, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
