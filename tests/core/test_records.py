from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from flcompress.core.records import (
    BreachLine,
    ContractPart,
    EngineManifest,
    EntryFile,
    EvalFile,
    ExportFile,
    FactsFile,
    HealthFile,
    ImportanceResult,
    MetricsLine,
    OnnxManifest,
    Record,
    RunFile,
)
from flcompress.core.settings import Health
from flcompress.errors import RecordError, RequestError
from flcompress.ir.selection import u_index

RUN = {"name": "digits", "recipe_path": "r.yaml", "created": "2026-01-02", "entries": ["passes/0"], "finished": True}
MEASURED = {"mean": 1.0, "low": 0.5, "high": 1.5, "values": [0.5, 1.5]}
CONTENDER = {"name": "s", "label": "s", "steps": 4, "guidance": 1.0, "evaluations": 4, "parameters": 9}
EVAL = {
    "benchmark": "moving-digits", "clips": 2, "seeds": 2, "prompts": 1, "floor": {"frechet": MEASURED},
    "contenders": [{**CONTENDER, "frechet": MEASURED}], "paired": [],
}  # fmt: skip


CONTRACT = {
    "scheduler": {"shift": 1.0}, "num_inference_steps": 1, "sigmas": [1.0], "timesteps": [1000], "guidance_scale": 4,
    "max_sequence_length": 16, "guidance_convention": "u + w (c - u)",
}  # fmt: skip
FACTS = {
    "contract": CONTRACT, "call": {"height": 64, "guidance_scale": 1.0}, "parameters": 9,
    "kept": {"blocks.0": "blocks.2"}, "latents": [4, 1, 8, 8], "pipeline_class": "FluxPipeline",
}  # fmt: skip
SHAPES = {"min": {"x": [1, 4]}, "opt": {"x": [2, 4]}, "max": {"x": [2, 4]}}
TENSOR = {"name": "x", "shape": ["batch", 4], "dtype": "float32"}
ENGINE = {
    "file": "model.engine", "sha256": "ab", "bytes": 1, "builder": {"name": "tensorrt_rtx", "version": "1.2"},
    "targets": ["sm89"], "precision": "fp32", "profiles": [{"batch": [1, 1, 2], "frames": None}], "shapes": [SHAPES],
    "inputs": [TENSOR], "outputs": [TENSOR], "timesteps": [999.0], "sigmas": [1], "shift": 1.0, "guidance_scale": 1.0,
    "contract": CONTRACT, "kept": {}, "source": {"file": "../onnx/model.onnx", "sha256": "cd"}, "checked_on_gpu": False,
    "difference": None, "tolerance": 1e-3,
}  # fmt: skip
ONNX = {
    "file": "model.onnx", "sha256": {"model.onnx": "ab"}, "opset": 18, "producer": "torch", "precision": "fp32",
    "inputs": [TENSOR], "outputs": [TENSOR], "dynamic": ["batch"], "parameters": 9, "tolerance": 1e-4,
    "difference": 1e-7, "magnitude": 1.5, "difference_to_fp32": 1e-7, "torch_difference_to_fp32": 0.0, "cases": 2,
    "checked": {"sizes": [[2, 3, 8, 8]], "arithmetic": "fp32"}, "contract": CONTRACT, "kept": {},
}  # fmt: skip


def written(folder: Path, value: object) -> Path:
    file = folder / "file.json"
    file.write_text(json.dumps(value))
    return file


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (RunFile, {**RUN, "entries": ["a", 1]}, 'entries is ["a", 1], expected a list of texts; give flcompress apply'),
        (RunFile, {**RUN, "finished": "yes"}, 'finished is "yes", expected true or false; give flcompress apply'),
        (RunFile, {**RUN, "done": 1}, "unknown key done, expected name, recipe_path, created, entries, finished; give"),
        (RunFile, [RUN], "holds list, expected an object; give flcompress apply RECIPE again"),
        (EntryFile, {"key": "k", "name": "n"}, "index is nothing, expected a number; remove its folder"),
        (EvalFile, {**EVAL, "contenders": {}}, "contenders is {}, expected a list of objects; make the file again"),
        (
            EvalFile,
            {**EVAL, "contenders": [{**CONTENDER, "frechet": {**MEASURED, "low": "x"}}]},
            'contenders[0].frechet.low is "x", expected a number; make the file again',
        ),
        (
            EvalFile,
            {**EVAL, "floor": {"frechet": {"mean": 1.0, "low": 1.0}}},
            "floor.frechet.high is nothing, expected a number; make the file again",
        ),
        (
            EvalFile,
            {**EVAL, "contenders": [{**CONTENDER, "frechet": {**MEASURED, "width": 1}}]},
            "unknown key contenders[0].frechet.width, expected mean, low, high, values; make the file again",
        ),
        (
            EvalFile,
            {**EVAL, "contenders": [{**CONTENDER, "frechet": 3}]},
            "contenders[0].frechet is 3, expected an",
        ),
    ],
)
def test_a_key_that_is_unknown_missing_or_of_another_type_is_one_line(
    kind: type[Record], value: Any, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, value)
    with pytest.raises(RecordError, match=re.escape(f"{file}: {message}")) as caught:
        kind.read(file)
    assert "\n" not in str(caught.value)


def test_a_file_of_a_newer_version_is_refused_by_name(tmp_path: Path) -> None:
    file = written(tmp_path, {"format": 2, "title": "digits"})
    message = f"{file}: written by a newer flcompress: format 2, this one reads up to 1; update flcompress"
    with pytest.raises(RecordError, match=re.escape(message)):
        RunFile.read(file)
    file.write_text('{"format": 2, "loss": 1}\n')
    with pytest.raises(RecordError, match=r"file.json: line 1: written by a newer flcompress: format 2"):
        MetricsLine.read_lines(file)


def test_a_record_is_written_as_it_was_built_and_read_back(tmp_path: Path) -> None:
    record = RunFile(**RUN)
    record.write(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == RUN
    assert list(json.loads((tmp_path / "run.json").read_text())) == list(RUN)
    assert RunFile.read(tmp_path / "run.json") == record
    assert EntryFile(key="k", name="n", index=1).dump() == {"key": "k", "name": "n", "index": 1}


def test_files_of_older_versions_keep_their_meaning(tmp_path: Path) -> None:
    entry = EntryFile.read(written(tmp_path, {"key": "k", "name": "prune", "index": 1, "arguments": {}, "seconds": 2}))
    assert (entry.seconds, entry.peak_rss_mb, entry.attempts) == (2.0, None, 1)
    breach = {"step": 1, "figure": "f", "value": None, "low": None, "high": 1.0, "setting": "s", "mend": "m"}
    (line,) = BreachLine.read_lines(written(tmp_path, {**breach, "action": "warn", "best_step": 0}))
    assert line.redrawn == []


@pytest.mark.parametrize(("kind", "value"), [(FactsFile, FACTS), (EngineManifest, ENGINE), (OnnxManifest, ONNX)])
def test_what_older_versions_exported_is_read(kind: type[Record], value: dict[str, Any], tmp_path: Path) -> None:
    record = kind.read_named(written(tmp_path, value), "", "make it again")
    assert record.dump() == value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (FactsFile, {**FACTS, "frames": 1}, "unknown key frames, expected contract, call, parameters, kept, latents, "),
        (FactsFile, {**FACTS, "contract": {}}, "contract.scheduler is nothing, expected an object; "),
        (OnnxManifest, {**ONNX, "sha256": "ab"}, 'sha256 is "ab", expected an object; '),
        (OnnxManifest, {**ONNX, "precision": "fp8"}, 'precision is "fp8", expected one of fp32, fp16, bf16; '),
        (EngineManifest, {**ENGINE, "shapes": None}, "shapes is nothing, expected a list of objects; "),
        (EngineManifest, {**ENGINE, "format": 2}, "written by a newer flcompress: format 2, this one reads up to 1; "),
        (EngineManifest, [ENGINE], "a JSON list given, expected an object; "),
    ],
)
def test_a_damaged_export_is_a_wrong_request(kind: type[Record], value: object, message: str, tmp_path: Path) -> None:
    file = written(tmp_path, value)
    with pytest.raises(RequestError, match=re.escape(f"{file}: {message}")) as caught:
        kind.read_named(file, "", "make it again with: flcompress export RUN")
    assert "format 2" in message or str(caught.value).endswith("; make it again with: flcompress export RUN")
    assert "\n" not in str(caught.value)


def test_a_contract_keeps_its_ints_which_its_digest_tells_from_floats(tmp_path: Path) -> None:
    contract = {
        "scheduler": {"shift": 1, "beta": 0.5}, "num_inference_steps": 2, "sigmas": [1, 0.5], "timesteps": [999, 500.0],
        "guidance_scale": 4, "max_sequence_length": 16,
    }  # fmt: skip
    again = ContractPart.model_validate_json(json.dumps(contract), strict=True).dump()
    assert json.dumps(again) == json.dumps({name: contract[name] for name in again})
    assert set(again) == set(contract)


def test_the_limits_file_has_every_setting_of_training_health() -> None:
    HealthFile(held_out="elbo_full", limits={}, **Health().model_dump(mode="json"))


def test_figures_that_are_not_finite_stay_so(tmp_path: Path) -> None:
    line = MetricsLine(step=1, **{"loss": math.nan, "drift": math.inf, "rate": 1, "clips": 1.0}).line()
    assert line == '{"step": 1, "loss": NaN, "drift": Infinity, "rate": 1, "clips": 1.0}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    (read,) = MetricsLine.read_lines(tmp_path / "metrics.jsonl")
    assert read.line() == line


def test_an_export_begins_with_what_its_exporter_returned() -> None:
    record = ExportFile(bytes=3, shapes=((1, 2),), key="k", seconds=1.0, peak_rss_mb=2.0, attempts=1)
    assert json.dumps(record.dump()) == (
        '{"bytes": 3, "shapes": [[1, 2]], "key": "k", "seconds": 1.0, "peak_rss_mb": 2.0, "attempts": 1}'
    )


def test_a_u_index_without_a_middle_is_none(tmp_path: Path) -> None:
    """Versions before records wrote NaN, which no JSON reader has to take."""
    assert u_index([1.0, 2.0]) is None
    file = tmp_path / "result.json"
    known = {"weighting": "elbo", "draws": 8, "levels": [], "blocks": [], "seconds": 1.0, "forwards_equivalent": 2.5}
    file.write_text(json.dumps(known | {"u_index": math.nan}), encoding="utf-8")
    assert ImportanceResult.read(file).u_index is None
    ImportanceResult(**known, u_index=None).write(file)
    assert json.loads(file.read_text(encoding="utf-8"))["u_index"] is None
