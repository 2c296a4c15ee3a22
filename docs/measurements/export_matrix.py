"""Export a tiny random pipeline of every family to ONNX and TensorRT.

`python -m docs.measurements.export_matrix fp32 [FAMILY ...]` writes what came of it to export_matrix.json. Each ONNX
file has to agree with torch through ONNX Runtime at the given precision, and each engine has to build.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from flcompress.core.program import Program
from flcompress.errors import FlcompressError
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from tests.families.exports import exportable
from tests.families.pipelines import EXPORTED

OUT = Path(__file__).with_name("export_matrix.json")


def row(name: str, precision: str) -> dict[str, Any]:
    """What each exporter made of a family."""
    with tempfile.TemporaryDirectory() as made:
        program = exportable(name, Path(made))
        found = {"class": program.graph.model_class, "pipeline": program.pipeline_class}
        return found | {precision: exports(program, precision, Path(made) / "exports")}


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


def main(precision: str, *names: str) -> None:
    """Write a row for each family; what was found at other precisions, and of other families, stays."""
    table = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    for name in names or list(EXPORTED):
        table[name] = table.get(name, {}) | row(name, precision)
        print(name, json.dumps(table[name]), flush=True)
        OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
