"""`flcompress encode` on real video files, with the parts of a tiny stock pipeline."""

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
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

from flcompress.cli import main
from flcompress.data.encoder import ClipTask, Encoder, Made, PromptTask
from flcompress.data.latents import LatentDataset
from flcompress.data.shards import Index
from flcompress.data.videos import read_clip
from flcompress.data.workers import workers
from flcompress.errors import DataError, FlcompressError
from flcompress.models.parts import open_parts
from tests.video_files import write_video


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, three captions, and every way to be unusable."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_video(folder / f"{number}.mp4", seed=number)
    write_video(folder / "deep" / "wide.mkv", frames=14, height=32, width=56)
    whole = write_video(folder / "cut.mp4", frames=20, height=48, width=64)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    (folder / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (6, 40)).save(folder / "tiny.gif")
    write_video(folder / "untold.mp4")
    rows = [("0.mp4", "a one"), ("1.mp4", "a two"), ("deep/wide.mkv", "a one"), ("2.mp4", "a two"), ("cut.mp4", "cut"),
            ("text.mp4", "text"), ("empty.mp4", "empty"), ("tiny.gif", "tiny")]  # fmt: skip
    lines = [json.dumps({"file": file, "caption": caption}) for file, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def arguments(model: Path, videos: Path, out: Path, *more: object) -> list[str]:
    given = ["encode", "--pipeline", model, "--videos", videos, "--captions", videos / "captions.jsonl", "--out", out,
             "--max-sequence-length", 16, *more]  # fmt: skip
    return list(map(str, given))


def encode(model: Path, videos: Path, out: Path, *more: object) -> Result:
    return CliRunner().invoke(main, arguments(model, videos, out, *more))


@pytest.fixture(scope="module")
def encoded(model: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("encoded") / "out"
    done = encode(model, videos, out, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return out, json.loads(done.stdout)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written(encoded: tuple[Path, dict[str, Any]]) -> None:
    out, told = encoded
    assert told == {
        "out": str(out),
        "clips": 4,
        "prompts": 2,
        "skipped": 5,
        "buckets": [
            {"frames": 9, "height": 32, "width": 32, "clips": 3},
            {"frames": 13, "height": 32, "width": 56, "clips": 1},
        ],
        "shards": 3,
        "bytes": sum(path.stat().st_size for path in out.glob("*.safetensors")),
        "made": 3,
    }
    assert sorted(contents(out)) == [
        "clips-00000.safetensors", "clips-00001.safetensors", "index.json", "prompts-00000.safetensors",
        "skipped.jsonl"]  # fmt: skip
    assert [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()] == [
        {"file": "cut.mp4", "reason": "cannot be decoded (Invalid data found when processing input)"},
        {"file": "empty.mp4", "reason": "an empty file"},
        {"file": "text.mp4", "reason": "cannot be decoded (Invalid data found when processing input)"},
        {"file": "tiny.gif", "reason": "smaller than the smallest size, 8 x 8"},
        {"file": "untold.mp4", "reason": "no caption names it"},
    ]
    assert "/" not in (out / "index.json").read_text().replace("deep/wide.mkv", "")  # no place of this machine


def test_the_numbers_are_those_of_the_pipelines_own_parts(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path
) -> None:
    out, _ = encoded
    index = Index.read(out)
    assert index.prompts == ("", "a one", "a two")
    first, wide = index.clip_shards
    assert [(clip.file, clip.prompt) for clip in first.clips] == [("0.mp4", 1), ("1.mp4", 2), ("2.mp4", 2)]
    assert [(clip.file, clip.prompt) for clip in wide.clips] == [("deep/wide.mkv", 1)]
    parts = open_parts(model)
    prompts = load_file(out / "prompts-00000.safetensors")
    expected = parts.encode_prompts(["a two"], 16)
    torch.testing.assert_close(prompts["encoder_hidden_states"][2:], expected["encoder_hidden_states"])
    for shard in (first, wide):
        latents = load_file(out / shard.file)["latents"]
        for row, clip in enumerate(shard.clips):
            one = parts.encode_clips(read_clip(videos / clip.file, shard.size, resize=False)[None])
            torch.testing.assert_close(latents[row], one[0], atol=1e-5, rtol=1e-5)


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


def test_a_wanted_size(model: Path, videos: Path, tmp_path: Path) -> None:
    done = encode(model, videos, tmp_path / "o", "--frames", 9, "--height", 16, "--width", 24, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    # The small one, of one frame, is scaled up.
    assert json.loads(done.stdout)["buckets"] == [
        {"frames": 1, "height": 16, "width": 24, "clips": 1}, {"frames": 9, "height": 16, "width": 24, "clips": 4}
    ]  # fmt: skip


def test_an_interrupted_command_goes_on(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", Encoder.make
    made: list[str] = []

    def make_two(self: Encoder, task: PromptTask | ClipTask) -> Made:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.file)
        return real(self, task)

    monkeypatch.setattr(Encoder, "make", make_two)
    stopped = encode(model, videos, out, "--quiet")
    assert stopped.exit_code == 130
    assert stopped.stderr == "interrupted; the same command goes on from here\n"
    with pytest.raises(DataError, match="an unfinished latent dataset; give the same flcompress encode again"):
        LatentDataset.load(out)
    refused = encode(model, videos, out, "--frames", 5)
    assert "holds a dataset made from another request (other target)" in refused.stderr

    monkeypatch.undo()
    # What a power cut can leave beside: half a line, a shard that never reached the disk, a file half written.
    with (out / ".encoding" / "done.jsonl").open("a") as file:
        file.write('{"task": "clips-0000')
    (out / made[0]).unlink()
    (out / ".clips-00001.safetensors.tmp").write_bytes(b"half")
    done = encode(model, videos, out, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["made"] == 2
    assert contents(out) == contents(encoded[0])


@pytest.mark.slow
def test_two_processes_killed_and_one_that_goes_on_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    rows = []
    for number in range(16):
        width = 24 + 8 * number  # each a shard of its own
        write_video(folder / f"{number}.mp4", height=32, width=width, seed=number)
        rows.append(json.dumps({"file": f"{number}.mp4", "caption": f"a {number}"}))
    broken = folder / "1.mp4"  # found out only while it is encoded
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
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers), "workers outlive a killed command"

    left = len(Index.read(whole).shards) - done.read_text().count("\n")
    again = encode(model, folder, killed, "--json", "--quiet")
    assert again.exit_code == 0, again.output
    assert 0 < json.loads(again.stdout)["made"] <= left + 1  # the broken one has no shard
    assert contents(killed) == contents(whole)
    assert json.loads((whole / "skipped.jsonl").read_text())["file"] == "1.mp4"


def test_clips_of_one_frame_rate(model: Path, tmp_path: Path) -> None:
    """Every file is taken at 8 frames a second, whatever its own rate; the index says so."""
    folder = tmp_path / "videos"
    for rate, frames in ((8, 9), (16, 17), (24, 30), (6, 30)):
        write_video(folder / f"{rate}.mp4", frames=frames, rate=rate)
    rows = [json.dumps({"file": f"{rate}.mp4", "caption": "a one"}) for rate in (8, 16, 24, 6)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    done = encode(model, folder, tmp_path / "out", "--fps", 8, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["buckets"] == [{"frames": 9, "height": 32, "width": 32, "clips": 3}]
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == (
        '{"file": "6.mp4", "reason": "6 frames a second, expected at least 8"}\n'
    )
    index = Index.read(tmp_path / "out")
    assert index.request["fps"] == 8.0
    latents = load_file(tmp_path / "out" / index.clip_shards[0].file)["latents"]
    assert [clip.file for clip in index.clip_shards[0].clips] == ["8.mp4", "16.mp4", "24.mp4"]
    clips = [read_clip(folder / f"{rate}.mp4", (9, 32, 32), resize=False, fps=8.0) for rate in (8, 16, 24)]
    torch.testing.assert_close(latents, open_parts(model).encode_clips(torch.stack(clips)), atol=1e-5, rtol=1e-5)


def test_prompts_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a one\na two\n\na one\n")
    given = ["--pipeline", model, "--captions", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    command = ["encode", *map(str, given), "--max-sequence-length", "16"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{tmp_path}/out: 2 prompts, 1 shards, ")
    assert Index.read(tmp_path / "out").prompts == ("", "a one", "a two")
    assert sorted(contents(tmp_path / "out")) == ["index.json", "prompts-00000.safetensors"]
    refused = CliRunner().invoke(main, [*command, "--frames", "9"])
    assert refused.exit_code == 2
    assert refused.stderr == (
        "error: encode: a size or frame rate is given, but no --videos; prompts have none: the recipe's sampling "
        "decides\n"
    )


def test_another_dataset_is_not_overwritten(
    encoded: tuple[Path, dict[str, Any]], model: Path, videos: Path, tmp_path: Path
) -> None:
    out, _ = encoded
    before = contents(out)
    for more, told in (
        (["--frames", 5], "other target"),
        (["--max-sequence-length", 8], "max_sequence_length: 16 there, 8 given"),
        (["--fps", 4], "fps: None there, 4.0 given"),
    ):
        refused = encode(model, videos, out, *more)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"error: {out}: holds a dataset made from another request ({told}); choose another --out\n"
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


def test_no_usable_video_at_all(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_text("no video")
    (folder / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "x"}')
    refused = encode(model, folder, tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == (
        f"error: {tmp_path}/out: no clip could be encoded; {tmp_path}/out/skipped.jsonl says why, video by video"
    )
    assert "a.mp4" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_no_model_no_captions(model: Path, videos: Path, tmp_path: Path) -> None:
    refused = encode(tmp_path / "none", videos, tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"error: {tmp_path}/none: no such model folder")
    refused = encode(model, tmp_path / "none", tmp_path / "out")
    assert refused.stderr == f"error: {tmp_path}/none: no such folder; expected a folder of videos\n"
    assert not (tmp_path / "out").exists()


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
