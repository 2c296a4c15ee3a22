"""Export a tiny random pipeline of every family to ONNX and TensorRT, or to Torch-TensorRT.

`python -m docs.measurements.export_matrix fp32 [FAMILY ...]` writes what came of it to export_matrix.json. Each ONNX
file has to agree with torch through ONNX Runtime at the given precision, and each engine has to build. In the
environment of `make test-torch-tensorrt`, which has neither, Torch-TensorRT builds an engine for each block instead,
and torch runs what each of them computes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from flcompress.core.program import Program
from flcompress.errors import FlcompressError, UnavailableError
from flcompress.evaluation.machine import machine
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.exporters.torch_tensorrt_engines import TorchTensorRTExporter
from flcompress.runtime.torch_tensorrt_api import installed_package, load_torch_tensorrt, versions
from tests.families.exports import exportable
from tests.families.pipelines import EXPORTED
from tests.torch_tensorrt.parts_in_torch import watched

OUT = Path(__file__).with_name("export_matrix.json")
TORCH_TENSORRT = TorchTensorRTExporter.name


def row(name: str, precision: str) -> dict[str, Any]:
    """What each exporter made of a family."""
    with tempfile.TemporaryDirectory() as made:
        program = exportable(name, Path(made))
        found = {"class": program.graph.model_class, "pipeline": program.pipeline_class}
        measure = exports if _package() is None else torch_tensorrt_export
        return found | {precision: measure(program, precision, Path(made) / "exports")}


def exports(program: Program, precision: Any, folder: Path) -> dict[str, Any]:
    """ONNX, and the engine where that came through: "ok" with figures, or the reason."""
    exporters = (OnnxExporter(precision=precision), TensorRTExporter())
    found: dict[str, Any] = {}
    for exporter in exporters:
        target = folder / exporter.name
        target.mkdir(parents=True)
        try:
            summary = exporter.export(program, target, folder, lambda *_: None)
        except FlcompressError as error:
            return found | {exporter.name: str(error).replace(f"{folder}/", "")}
        found[exporter.name] = "ok"
        if exporter.name == "onnx":
            found |= {key: summary[key] for key in ("difference", "dynamic")}
        elif summary["difference"] is not None:  # a GPU here ran it
            found[f"{exporter.name} difference"] = summary["difference"]
    return found


def torch_tensorrt_export(program: Program, precision: Any, folder: Path) -> dict[str, Any]:
    """One engine a block by Torch-TensorRT: "ok" with figures, or the reason; and when, where and by what."""
    here, target = machine("cpu"), folder / TORCH_TENSORRT
    target.mkdir(parents=True)
    exporter = TorchTensorRTExporter(precision=precision, engine="block", targets=("sm89",))
    exporter.check()
    by = versions(load_torch_tensorrt())
    run = {"day": datetime.now(UTC).date().isoformat()} | {key: here[key] for key in ("cpu", "cores", "gpu")}
    run["versions"] = {by["name"]: by["version"]} | {key: by[key] for key in ("tensorrt", "torch")}
    found: dict[str, Any] = {f"{TORCH_TENSORRT} run": run}
    with pytest.MonkeyPatch.context() as patch:
        parts = watched(program, precision, patch)
        try:
            summary = exporter.export(program, target, folder, lambda *_: None)
        except FlcompressError as error:
            return found | {TORCH_TENSORRT: str(error).replace(f"{folder}/", "")}
    figures = {key: summary[key] for key in ("engines", "operators", "in_torch")}
    return found | {TORCH_TENSORRT: "ok", f"{TORCH_TENSORRT} graph": figures | {"difference": parts.difference()}}


def merged(old: Mapping[str, Any], new: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Return a family's row with what was run now in place of what the same environment found before."""

    def of_now(key: str) -> bool:
        return key.startswith(TORCH_TENSORRT) == any(name.startswith(TORCH_TENSORRT) for name in new[precision])

    kept = {key: value for key, value in old.get(precision, {}).items() if not of_now(key)}
    return {**old, **new, precision: kept | new[precision]}


def _package() -> str | None:
    try:
        return installed_package()
    except UnavailableError:
        return None


def main(precision: str, *names: str) -> None:
    """Write a row for each family; what was found at other precisions, and of other families, stays."""
    table = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    for name in names or list(EXPORTED):
        table[name] = merged(table.get(name, {}), row(name, precision), precision)
        print(name, json.dumps(table[name]), flush=True)
        OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
