from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flcompress.driver.rundir import RunDirectory
from flcompress.evaluation import backends
from flcompress.evaluation import bench as bench_module
from flcompress.evaluation.bench import _Stage, bench
from flcompress.models.loading import load_transformer

pytestmark = pytest.mark.e2e


def test_work_is_counted_and_rounds_are_timed(run: RunDirectory) -> None:
    told: list[tuple[int, int]] = []
    results = bench(run, 2, lambda done, total, values: told.append((done, total)), ["ONNX Runtime"])
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
    (skipped,) = results["skipped"]
    assert skipped["backend"] == "ONNX Runtime"
    assert "model.onnx; add `- onnx`" in skipped["reason"]
    assert json.loads((run.path / "bench" / "results.json").read_text(encoding="utf-8")) == results


def test_clips_are_timed_at_the_size_that_is_sampled(run: RunDirectory) -> None:
    program = replace(run.final(), latents=(16, 2, 6, 10))
    assert _Stage(program).noise.shape == (1, 16, 2, 6, 10)


def test_a_gpu_that_did_not_compute_is_not_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    assert bench_module._machine(torch.device("cpu"))["gpu"] is None
    assert bench_module._machine(torch.device("cuda", 0))["gpu"] == "NVIDIA H100 80GB HBM3"
    assert load_transformer(run.final().components["transformer"]).device.type == "cpu"


def test_no_onnx_runtime_is_a_stated_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(backends.Unusable, match=r"pip install 'flcompress\[onnxruntime\]'"):
        backends.onnx_network(tmp_path / "model.onnx")


def test_no_compiler_is_a_stated_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(backends.Unusable, match=r"no C\+\+ compiler \(no-such-compiler\) for torch\.compile"):
        backends.compiled(None)


def test_no_headers_are_a_stated_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "sh")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(backends.Unusable, match=r"Python\.h for torch\.compile"):
        backends.compiled(None)


def test_an_onnx_file_of_something_else_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [result])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, tmp_path / "model.onnx")
    with pytest.raises(backends.Unusable, match="inputs x, expected hidden_states"):
        backends.onnx_network(tmp_path / "model.onnx")
