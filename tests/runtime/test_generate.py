"""Prompt in, file out, by any backend; the same seed gives the same clip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageSequence

from flcompress.cli import main
from flcompress.core.backend import TransformerFiles
from flcompress.core.program import Program
from flcompress.core.records import FactsFile
from flcompress.errors import RequestError, UnavailableError
from flcompress.exporters.diffusers_folder import DiffusersExporter
from flcompress.models.loading import load_transformer
from flcompress.models.parts import open_parts
from flcompress.runtime import generate as generating
from flcompress.runtime import torch_session
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.backends.torch_backend import TorchBackend
from flcompress.runtime.clip_files import frames_of, write_clip
from flcompress.runtime.generate import generate
from flcompress.runtime.tensorrt_api import cuda_driver

pytestmark = pytest.mark.e2e

PROMPT = "a three drifting up and left, fast"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_torch_and_onnx_make_the_same_clip(run: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int, values: Mapping[str, float]) -> None:
        told.append((done, total))

    first = generate(run, PROMPT, "torch", tmp_path / "a.png", seed=3, progress=progress)
    second = generate(run, PROMPT, "onnx", tmp_path / "b.png", seed=3)
    other = generate(run, PROMPT, "onnx", tmp_path / "c.png", seed=4)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert pixels(first).shape == (256, 9 * 256, 3)
    assert np.abs(pixels(first) - pixels(second)).max() <= 1  # one step of 255, where a value lies on the edge
    assert np.abs(pixels(first) - pixels(other)).max() > 1


def test_all_that_a_sampler_holds_is_on_the_device_of_the_networks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shown on the meta device, which refuses a tensor of another one; what is drawn is drawn on the CPU."""
    pipeline = run / "exports" / "diffusers"
    devices: set[str] = set()

    def network(x: torch.Tensor, timestep: torch.Tensor, conditioning: Mapping[str, torch.Tensor]) -> torch.Tensor:
        devices.update(tensor.device.type for tensor in (x, timestep, *conditioning.values()))
        return torch.zeros_like(x)

    monkeypatch.setattr(generating, "best_device", lambda: "meta")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    facts = FactsFile.read(pipeline / "flcompress.json")
    latents = generating.denoise(network, open_parts(pipeline), facts, PROMPT, seed=3)
    assert (devices, latents.device.type) == ({"meta"}, "meta")


@pytest.mark.parametrize(("device", "dtype"), [("cpu", None), ("cuda", torch.bfloat16)])
def test_a_gpu_computes_in_half_precision(
    device: str, dtype: torch.dtype | None, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def loading(*given: object) -> Any:
        asked.append(given)
        return load_transformer(run / "exports" / "diffusers" / "transformer")

    monkeypatch.setattr(torch_session, "load_transformer", loading)
    monkeypatch.setattr(torch_session, "best_device", lambda: device)
    folder = run / "exports" / "diffusers"
    files = TransformerFiles(stock=folder / "transformer", export=folder, guidance=None, make_it="")
    network = TorchBackend().open(files)
    assert asked == [(folder / "transformer", device, dtype)]
    assert (network.device, network.precision) == (device, "bf16" if dtype else "fp32")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_torch_computes_in_the_precision_that_is_asked_for(precision: str, run: Path) -> None:
    folder = run / "exports" / "diffusers"
    files = TransformerFiles(stock=folder / "transformer", export=folder, guidance=None, make_it="")
    exact, half = (choose_backend("torch", {"precision": kind}).open(files) for kind in ("fp32", precision))
    assert (exact.precision, half.precision) == ("fp32", precision)
    assert half.weight_bytes < 0.6 * exact.weight_bytes  # norms and the time embedding stay fp32
    draw = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 3, 8, 8, generator=draw), torch.randn(1, 16, 64, generator=draw)
    with torch.no_grad():
        expected, got = (net(x, torch.tensor([500.0]), {"encoder_hidden_states": text}) for net in (exact, half))
    assert got.dtype == torch.float32
    assert 0.0 < float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())


def test_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    choose_backend("torch", {"precision": "fp16"}).require()
    for name in ("torch", "compile"):
        with pytest.raises(UnavailableError) as caught:
            choose_backend(name, {"precision": "bf16"}).require()
        assert str(caught.value) == (
            "--precision: bf16 given, but Tesla T4 (sm75) has none; use --precision fp16 or fp32"
        )


def test_a_gif_and_a_video(tmp_path: Path) -> None:
    clip = torch.linspace(-1, 1, 3 * 9 * 32 * 48).reshape(3, 9, 32, 48)
    with Image.open(write_clip(clip, tmp_path / "new" / "clip.gif", 24.0)) as gif:
        assert (gif.size, getattr(gif, "n_frames", 0)) == ((384, 256), 9)
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert shown == [40, 40, 40, 50, 40, 40, 40, 40, 50]  # hundredths of a second, 0.38 of one in all
    with av.open(str(write_clip(clip, tmp_path / "clip.mp4", 23.976))) as video:
        assert float(video.streams.video[0].average_rate or 0) == pytest.approx(23.976, abs=1e-3)
        frames = list(video.decode(video=0))
    assert (len(frames), frames[0].width, frames[0].height) == (9, 384, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "new"]


def rate(path: Path) -> float:
    with av.open(str(path)) as video:
        return float(video.streams.video[0].average_rate or 0)


def test_a_clip_plays_at_its_models_rate_or_as_asked(copy: Path, tmp_path: Path) -> None:
    assert rate(generate(copy, PROMPT, "torch", tmp_path / "a.mp4")) == 16.0
    facts = copy / "exports" / "diffusers" / "flcompress.json"
    told = json.loads(facts.read_text())
    assert "fps=16)" in (copy / "exports" / "diffusers" / "README.md").read_text()
    facts.write_text(json.dumps({**told, "frame_rate": 8.0}))  # as of a run whose data has that rate
    assert rate(generate(copy, PROMPT, "torch", tmp_path / "b.mp4")) == 8.0
    del told["frame_rate"]  # as exported before it was noted
    facts.write_text(json.dumps(told))
    assert rate(generate(copy, PROMPT, "torch", tmp_path / "c.mp4")) == 16.0
    given = ["generate", str(copy), "--prompt", PROMPT, "--out", str(tmp_path / "d.mp4"), "--fps", "12.5", "--quiet"]
    assert CliRunner().invoke(main, given).exit_code == 0
    assert rate(tmp_path / "d.mp4") == 12.5


def test_a_negative_prompt_is_for_guided_models(copy: Path, guided: Program, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--negative-prompt: 'slow' given, but this model is sampled without text"):
        generate(copy, PROMPT, "torch", tmp_path / "a.png", negative_prompt="slow")
    shutil.rmtree(copy / "exports" / "diffusers")
    (copy / "exports" / "diffusers").mkdir()
    program = replace(guided, contract=replace(guided.contract, negative_prompt="a two, slow"))
    DiffusersExporter().export(program, copy / "exports" / "diffusers", copy / "exports", lambda *told: None)
    facts = json.loads((copy / "exports" / "diffusers" / "flcompress.json").read_text())
    assert facts["call"]["negative_prompt"] == facts["contract"]["negative_prompt"] == "a two, slow"
    assert "negative_prompt='a two, slow'," in (copy / "exports" / "diffusers" / "README.md").read_text()
    usual = generate(copy, PROMPT, "torch", tmp_path / "a.png")
    same = generate(copy, PROMPT, "torch", tmp_path / "b.png", negative_prompt="a two, slow")
    other = generate(copy, PROMPT, "torch", tmp_path / "c.png", negative_prompt="")
    assert np.array_equal(pixels(usual), pixels(same))
    assert not np.array_equal(pixels(usual), pixels(other))
    manifest = copy / "exports" / "onnx" / "manifest.json"  # as of an export of the guided program
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "contract": facts["contract"]}))
    by_onnx = generate(copy, PROMPT, "onnx", tmp_path / "d.png", negative_prompt="")
    assert np.abs(pixels(by_onnx) - pixels(other)).max() <= 1


def test_large_clips_keep_their_size_and_every_pixel_its_place() -> None:
    clip = torch.full((3, 2, 240, 416), -1.0)
    clip[:, 1, 0, 0] = 1.0
    frames = frames_of(clip)
    assert [frame.size for frame in frames] == [(416, 240), (416, 240)]
    assert frames[1].getpixel((0, 0)) == (255, 255, 255)
    assert frames[0].getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.webm", r"clip\.webm: extension '\.webm' given, expected one of \.gif, \.mp4, \.png$"),
        ("clip", r"clip: extension '' given, expected one of"),
        ("taken/clip.gif", r"taken/clip\.gif: .*taken is a file, expected a folder$"),
        ("folder.gif", r"folder\.gif: is a folder, expected a file name$"),
    ],
)
def test_where_no_clip_can_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.gif").mkdir()
    with pytest.raises(RequestError, match=message):
        generate(tmp_path, PROMPT, "torch", tmp_path / name)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "byte 0xe9 is not UTF-8"),
        ("smile \ud83d", r"half of a sign (\ud83d)"),
    ],
)
def test_a_prompt_that_is_no_text_is_one_line(tmp_path: Path, text: str, fault: str) -> None:
    for option, prompts in (("--prompt", (text, None)), ("--negative-prompt", ("a clip", text))):
        with pytest.raises(RequestError) as refused:
            generate(tmp_path, prompts[0], "torch", tmp_path / "clip.gif", negative_prompt=prompts[1])
        assert str(refused.value) == f"{option}: {fault}; give the prompt in UTF-8"


def test_tensorrt_without_a_driver_says_so_before_any_work(tmp_path: Path) -> None:
    if cuda_driver():
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(UnavailableError) as caught:
        generate(tmp_path / "nowhere", PROMPT, "tensorrt", tmp_path / "clip.gif")
    assert str(caught.value) == (
        "backend tensorrt: no CUDA driver here, and an engine runs on an NVIDIA GPU only; use --backend onnx or "
        "--backend torch, or run it on a machine with one"
    )


def test_a_missing_export_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        generate(tmp_path, PROMPT, "torch", tmp_path / "clip.gif")
    assert str(caught.value) == (
        f"{tmp_path}/exports/diffusers/flcompress.json: not exported yet; make it with: "
        f"flcompress export {tmp_path} --format diffusers"
    )


def test_a_missing_onnx_export_names_its_command(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "exports" / "diffusers", tmp_path / "exports" / "diffusers")
    with pytest.raises(RequestError, match=r"onnx/manifest\.json: not exported yet; .*--format onnx$"):
        generate(tmp_path, PROMPT, "onnx", tmp_path / "clip.gif")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_damaged_export_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "exports" / "onnx" / "model.onnx").write_bytes(b"half")
    with pytest.raises(
        RequestError, match=r"model\.onnx: SHA-256 .*make it again with: flcompress export .*--format onnx$"
    ):
        generate(copy, PROMPT, "onnx", tmp_path / "clip.gif")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"onnx/manifest\.json: not valid JSON .*; make it again with: flcompress export .* --format onnx$"),
        ("[]", r"manifest\.json: a JSON list given, expected an object; make it again with: .* --format onnx$"),
        ("{}", r"manifest\.json: file is nothing, expected a text; make it again with: .* --format onnx$"),
        ('{"files": 1}', r"manifest\.json: .*; make it again with: .* --format onnx$"),
        ('{"format": 2}', r"manifest\.json: written by a newer flcompress: format 2, this one reads up to 1"),
    ],
)
def test_a_damaged_manifest_is_refused(copy: Path, tmp_path: Path, text: str, message: str) -> None:
    (copy / "exports" / "onnx" / "manifest.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        generate(copy, PROMPT, "onnx", tmp_path / "clip.gif")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 9}, r"flcompress\.json: unknown key frames, expected contract, call, .*; make it again with: flc"),
        ({"latents": None}, r"flcompress\.json: latents is nothing, expected a list of numbers; make it again with: "),
        ({"contract": {}}, r"flcompress\.json: contract\.scheduler is nothing, expected an object; make it again with"),
    ],
)
def test_a_damaged_facts_file_is_refused(copy: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = copy / "exports" / "diffusers" / "flcompress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RequestError, match=message):
        generate(copy, PROMPT, "torch", tmp_path / "clip.gif")


def test_exports_of_two_contracts_are_refused(copy: Path, tmp_path: Path) -> None:
    path = copy / "exports" / "onnx" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["contract"]["guidance_scale"] = 2.0
    path.write_text(json.dumps(manifest))
    with pytest.raises(RequestError, match="is not that of the diffusers export; make both again"):
        generate(copy, PROMPT, "onnx", tmp_path / "clip.gif")


def test_nothing_is_drawn_over_the_command(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generate(run, PROMPT, "torch", tmp_path / "clip.gif")
    assert capfd.readouterr() == ("", "")


def test_the_command_shows_each_network_call(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flcompress.progress.PLAIN_SECONDS", 0.0)
    given = ["generate", str(run), "--prompt", PROMPT, "--out", str(tmp_path / "clip.gif")]
    told = CliRunner().invoke(main, given)
    assert told.exit_code == 0, told.output
    assert [line.strip().split(",")[0] for line in told.stderr.splitlines()] == [
        f"generate: {n}/4" for n in range(1, 5)
    ]
    assert CliRunner().invoke(main, [*given, "--quiet"]).stderr == ""
