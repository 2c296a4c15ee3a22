"""`flcompress bench` times the run's own model: any family, its size, its conditioning, both experts of a pair."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.core.registry import find_backend, known_backends
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import UnavailableError
from flcompress.evaluation import bench as bench_module
from flcompress.evaluation.bench import _Stage, bench, read_size
from flcompress.evaluation.machine import machine
from flcompress.models.loading import load_transformer
from flcompress.reporting.findings import headline
from flcompress.reporting.reading import read_run
from flcompress.runtime import torch_session
from flcompress.runtime.backends.torch_backend import CompileBackend
from flcompress.runtime.torch_session import TorchSession

pytestmark = pytest.mark.e2e


def test_work_is_counted_and_rounds_are_timed(run: RunDirectory) -> None:
    told: list[tuple[int, int]] = []
    results = bench(run, 2, lambda done, total, values: told.append((done, total)), ["torch"])
    assert results["program"] == run.entries()[-1].key
    teacher, student = results["teacher"], results["student"]
    assert (teacher["evaluations"], student["evaluations"]) == (6, 2)
    sizes = [
        sum(p.numel() for p in load_transformer(run.final().components[name]).parameters())
        for name in ("original", "transformer")
    ]
    assert [teacher["parameters"], student["parameters"]] == sizes
    assert results["work_ratio"] == pytest.approx(3 * sizes[0] / sizes[1])
    assert teacher["flops"] > 3 * student["flops"] > 0
    assert told[-1] == (6, 6)
    assert [(row["backend"], row["what"]) for row in results["rows"]] == [
        ("torch eager", "denoising"),
        ("torch eager", "pipeline"),
    ]
    for row in results["rows"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["teacher_seconds"]["low"] > 0
        for side, parameters in zip(("teacher", "student"), sizes, strict=True):
            assert row[f"{side}_memory"] is None or row[f"{side}_memory"] >= 4 * parameters
    assert results["skipped"] == []
    assert json.loads((run.path / "bench" / "results.json").read_text(encoding="utf-8")) == results


def test_what_was_timed_is_recorded_and_headlined(run: RunDirectory) -> None:
    results = bench(run, 1, backends=["torch"])
    assert (results["family"], results["pipeline"]) == ("Wan", "WanPipeline")
    assert results["size"] == {"frames": 9, "height": 32, "width": 32}
    assert results["latents"] == list(run.final().latents)
    assert (results["device"], results["precision"], results["batch"]) == ("cpu", "fp32", 1)
    top = headline(read_run(run.path))
    assert top is not None
    assert top.measured_on == "torch eager, denoising, Wan at 9 x 32 x 32, fp32 on CPU"
    results = bench(run, 1, backends=["torch"], size=(5, 16, 48), batch=2)
    assert results["size"] == {"frames": 5, "height": 16, "width": 48}
    assert results["latents"][1:] == [2, 4, 12]
    top = headline(read_run(run.path))
    assert top is not None
    assert top.measured_on == "torch eager, denoising, Wan at 5 x 16 x 48, batch 2, fp32 on CPU"


def test_results_of_earlier_versions_are_headlined_as_they_were(run: RunDirectory) -> None:
    results = bench(run, 1, backends=["torch"])
    new = ("family", "pipeline", "size", "latents", "device", "precision")
    old = {key: value for key, value in results.items() if key not in new}
    (run.path / "bench" / "results.json").write_text(json.dumps(old))
    top = headline(read_run(run.path))
    assert top is not None
    assert top.measured_on == "torch eager, denoising"


def test_a_backend_that_was_asked_for_is_needed(run: RunDirectory) -> None:
    told = CliRunner().invoke(main, ["bench", str(run.path), "--backend", "onnx", "--rounds", "1", "--quiet"])
    assert told.exit_code == 2
    assert told.stderr == (
        f"error: {run.path}/exports/onnx/manifest.json: not exported yet; make it with: "
        f"flcompress export {run.path} --format onnx\n"
    )


def test_a_backend_that_cannot_run_is_skipped_with_the_reason(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_session, "missing_compiler", lambda: "no C++ compiler")
    told: list[tuple[int, int]] = []
    results = bench(run, 1, lambda done, total, values: told.append((done, total)))
    labels = [find_backend(name).label for name in known_backends() if name != "torch"]
    assert [row["backend"] for row in results["skipped"]] == labels
    assert labels[:3] == ["torch.compile", "ONNX Runtime", "TensorRT"]
    assert results["skipped"][0]["reason"] == "backend compile: no C++ compiler"
    assert "onnx/manifest.json: not exported yet" in results["skipped"][1]["reason"]
    assert told[-1] == (4, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--size", "9x32"], "--size: 9x32 given, expected FRAMESxHEIGHTxWIDTH, such as 81x480x832"),
        (["--size", "0x32x32"], "--size: 0x32x32 given, expected FRAMESxHEIGHTxWIDTH"),
        (["--size", "10x32x32"], "--size, frames: 10 given, expected 1 plus a multiple of 4 for this model, such as 9"),
        (["--size", "9x30x32"], "--size, height: 30 given, expected a multiple of "),
        (
            ["--backend", "tpu"],
            "--backend: tpu given, expected an installed one; known: compile, onnx, ",
        ),
        (["--backend", "onyx"], "--backend: onyx given, expected an installed one; did you mean 'onnx'?"),
        (["--provider", "tpu"], "--provider: tpu given, expected one of cpu, cuda"),
        (["--backend", "torch", "--provider", "cpu"], "--provider: cpu given, but backend torch has no such option"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(run: RunDirectory, given: list[str], message: str) -> None:
    told = CliRunner().invoke(main, ["bench", str(run.path), *given, "--quiet"])
    assert told.exit_code == 2
    assert message in told.stderr


def test_a_size_is_frames_height_and_width() -> None:
    assert read_size("81x480x832") == (81, 480, 832)


def test_clips_are_timed_at_the_size_that_is_sampled(run: RunDirectory) -> None:
    program = replace(run.final(), latents=(16, 2, 6, 10))
    assert _Stage(program, "cpu", 1, None).noise.shape == (1, 16, 2, 6, 10)


def test_a_gpu_that_did_not_compute_is_not_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    assert machine("cpu")["gpu"] is None
    assert machine("cuda")["gpu"] == "NVIDIA H100 80GB HBM3"
    assert load_transformer(run.final().components["transformer"]).device.type == "cpu"


def test_a_full_gpu_is_one_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(bench_module, "sample", full)
    told = CliRunner().invoke(main, ["bench", str(run.path), "--rounds", "1", "--quiet"])
    assert told.exit_code == 1
    assert told.stderr.count("\n") == 1
    assert "out of GPU memory (CUDA out of memory. Tried to allocate 2.00 GiB" in told.stderr


def test_no_compiler_is_a_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch_session, "best_device", lambda: "cpu")
    with pytest.raises(UnavailableError, match=r"no C\+\+ compiler \(no-such-compiler\) for torch\.compile"):
        CompileBackend().require()


def test_no_headers_are_a_stated_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(torch_session, "best_device", lambda: "cpu")
    with pytest.raises(UnavailableError, match=r"Python\.h for torch\.compile"):
        CompileBackend().require()


def test_a_compiled_session_shares_its_weights(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)
    eager = TorchSession(run.final().components["transformer"], "cpu")
    compiled = eager.compiled()
    assert compiled.transformer is not eager.transformer
    pairs = zip(eager.transformer.parameters(), compiled.transformer.parameters(), strict=True)
    assert all(one is other for one, other in pairs)
    assert not [name for name, part in eager.transformer.named_modules() if "forward" in vars(part)]
    blocks = [name for name, part in compiled.transformer.named_modules() if "forward" in vars(part)]
    assert blocks == ["blocks.0", "blocks.1"]
