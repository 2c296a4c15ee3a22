"""`flcompress encode` on real video files, with the parts of a tiny stock pipeline."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from flcompress.cli import main
from flcompress.data import encoder
from flcompress.data.dataset import LatentDataset
from flcompress.data.encoder import ClipTask, Encoder, clip_tensors
from flcompress.data.index import ClipRecord, Index
from flcompress.data.videos import read_clip
from flcompress.models.folder import check_pipeline
from flcompress.models.parts import Parts, open_parts, part_names
from tests.fixtures.encode_command import contents, encode
from tests.fixtures.mp4_boxes import turn
from tests.fixtures.video_files import Tags, cut, write_colour, write_video

pytestmark = pytest.mark.e2e


def test_what_is_written(encoded: tuple[Path, dict[str, Any]]) -> None:
    out, summary = encoded
    assert summary == {
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
    _, prompts = LatentDataset.load(out).conditions(1, torch.Generator(), (1, 1, 1, 1))
    stored = load_file(out / "prompts-00000.safetensors")
    expected = [parts.encode_prompts([text], 16)["encoder_hidden_states"] for text in ("a one", "a two")]
    own = prompts["encoder_hidden_states"]
    assert min(float((own - value).abs().max()) for value in expected) < 1e-5
    used = [int(value[0].any(dim=1).sum()) for value in expected]
    assert max(used) < own.shape[1] == 16, "the pipeline pads with zeros"
    assert len(stored["encoder_hidden_states"]) - sum(used) in range(16), "each at its own length, the empty one too"
    for shard in (first, wide):
        latents = load_file(out / shard.file)["latents"]
        for row, clip in enumerate(shard.clips):
            encoded_alone = parts.encode_clips(read_clip(videos / clip.file, shard.size, resize=False)[None])
            torch.testing.assert_close(latents[row], encoded_alone[0], atol=1e-5, rtol=1e-5)


def test_a_wanted_size(model: Path, videos: Path, tmp_path: Path) -> None:
    done = encode(model, videos, tmp_path / "o", "--frames", 9, "--height", 16, "--width", 24, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    # The small one, of one frame, is scaled up.
    assert json.loads(done.stdout)["buckets"] == [
        {"frames": 1, "height": 16, "width": 24, "clips": 1}, {"frames": 9, "height": 16, "width": 24, "clips": 4}
    ]  # fmt: skip


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


def test_the_size_in_the_plan_is_that_which_is_shown(model: Path, tmp_path: Path) -> None:
    """Pixel shape, a turn, hidden frames: measured and read alike; what cannot be shown is listed with the reason."""
    folder = tmp_path / "videos"
    write_video(folder / "wide.mp4", height=32, width=48, pixel=(4, 3))
    turn(write_video(folder / "turned.mp4", height=32, width=64), (0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000))
    long = write_video(tmp_path / "long.mp4", frames=40, height=32, width=64, gop=20, options={"bf": "0"})
    cut(long, folder / "cut.mp4", 30 / 8)
    write_colour(folder / "hdr.mp4", (200, 40, 40), Tags(9, 9, 16))
    names = ["wide.mp4", "./turned.mp4", "CUT.mp4", "hdr.mp4"]
    rows = [json.dumps({"file": name, "caption": f"a\u2028{name}"}, ensure_ascii=False) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = encode(model, folder, tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["buckets"] == [
        {"frames": 9, "height": 32, "width": 64, "clips": 2}, {"frames": 9, "height": 64, "width": 32, "clips": 1}
    ]  # fmt: skip
    assert "2 names are written otherwise than the files'; the first: ./turned.mp4 is turned.mp4" in done.stderr
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text()) == {
        "file": "hdr.mp4", "reason": "HDR (PQ); convert it to standard range (BT.709) first"
    }  # fmt: skip
    index = Index.read(tmp_path / "out")
    assert [clip.file for shard in index.clip_shards for clip in shard.clips] == ["wide.mp4", "cut.mp4", "turned.mp4"]
    assert index.prompts == ("", "a\u2028wide.mp4", "a\u2028CUT.mp4", "a\u2028./turned.mp4")


def test_the_next_video_is_read_while_one_is_encoded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where encoding fails, reading ends."""
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", seed=number)
    read = {f"{number}.mp4": threading.Event() for number in range(3)}
    beats: list[str] = []

    def reading(path: Path, *given: Any, **named: Any) -> torch.Tensor:
        read[path.name].set()
        return read_clip(path, *given, **named)

    def encoding(parts: Parts, clips: torch.Tensor, texts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
        beats.append("encoded")
        number = int(texts[0])
        assert number == 2 or read[f"{number + 1}.mp4"].wait(300.0)
        assert number > 0 or not read["2.mp4"].is_set()
        if number == 2:
            raise MemoryError("of the GPU")
        return clip_tensors(parts, clips, texts, length)

    monkeypatch.setattr(encoder, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(encoder, "read_clip", reading)
    monkeypatch.setattr(encoder, "clip_tensors", encoding)
    index = check_pipeline(model)
    components = {name: model / name for name in ("transformer", *part_names(index))}
    ours = Encoder(
        index, components, "cpu", 16, tmp_path, tmp_path, resize=False, fps=None, heartbeat=lambda: beats.append("beat")
    )
    clips = tuple(ClipRecord(file=f"{number}.mp4", prompt=0) for number in range(3))
    with pytest.raises(MemoryError, match="of the GPU"):
        ours.make(ClipTask("shard.safetensors", (9, 32, 32), clips, ("0", "1", "2")))
    assert beats == ["beat", "encoded"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
    assert not (tmp_path / "shard.safetensors").exists()


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
