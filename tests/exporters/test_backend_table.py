from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from docs.measurements import backend_table
from docs.measurements.backend_table import PAGE, page, table
from docs.measurements.export_matrix import merged


def test_the_page_has_the_table_of_what_was_run() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")
    assert table() in page(), "python -m docs.measurements.backend_table"


ONNX: dict[str, Any] = {"onnx": "ok", "difference": 1e-6, "tensorrt": "ok"}
RUN = {"day": "2026-11-29", "cpu": "Xeon", "cores": 2, "gpu": None, "versions": {"torch-tensorrt-rtx": "2.14.0"}}
ENGINES: dict[str, Any] = {
    "torch-tensorrt": "ok",
    "torch-tensorrt run": RUN,
    "torch-tensorrt graph": {"engines": 5, "operators": 300, "in_torch": [], "difference": 2e-6},
}
REFUSED: dict[str, Any] = {"torch-tensorrt": "torch-tensorrt: no converter", "torch-tensorrt run": RUN}


def test_what_torch_tensorrt_built_has_a_column_with_day_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"wan": {"class": "Wan", "fp32": ONNX | ENGINES, "fp16": ONNX | REFUSED, "bf16": ONNX}}
    (tmp_path / "export_matrix.json").write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setattr(backend_table, "HERE", tmp_path)
    head, _, *rows, blank, run = table().splitlines()
    assert head.endswith("| TensorRT engine | Torch-TensorRT, an engine a block |")
    assert [row.split(" | ")[-1] for row in rows] == [
        "5 engines built, 0 of 300 operators in torch; graph 2.0e-06 |",
        "torch-tensorrt: no converter |",
        "not tried |",
    ]
    assert (blank, run.partition(": ")[2]) == ("", "2026-11-29, 2 cores of Xeon, no GPU; torch-tensorrt-rtx 2.14.0.")


def test_each_environment_replaces_what_it_found_before() -> None:
    row = {"class": "Wan", "fp32": ONNX | ENGINES, "bf16": ONNX}
    refused = {"class": "Wan", "fp32": REFUSED}
    assert merged(row, refused, "fp32") == row | {"fp32": ONNX | REFUSED}
    failed = {"class": "Wan", "fp32": {"onnx": "onnx: refused"}}
    assert merged(row, failed, "fp32") == row | {"fp32": ENGINES | {"onnx": "onnx: refused"}}
    assert merged({}, refused, "fp32") == refused
