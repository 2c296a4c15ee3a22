"""The table of families, back ends and precisions in docs/exporting.md, from what `export_matrix` wrote.

`python -m docs.measurements.backend_table` writes it anew. A back end is one entry of `BACKENDS`; it has a column where
any family has a result of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "exporting.md"
BEGIN, END = "<!-- families: written by docs/measurements/backend_table.py -->\n", "<!-- end of families -->\n"

PRECISIONS = ("fp32", "fp16", "bf16")
BACKENDS = {
    "onnx": "ONNX Runtime, CPU",
    "tensorrt": "TensorRT engine",
    "torch-tensorrt": "Torch-TensorRT, an engine a block",
}
"""Key of a result -> head of its column."""


def table() -> str:
    """Return the table in Markdown: a row for each family and precision."""
    families: dict[str, dict[str, Any]] = json.loads((HERE / "export_matrix.json").read_text(encoding="utf-8"))
    results = {(name, kind): row.get(kind, {}) for name, row in sorted(families.items()) for kind in PRECISIONS}
    shown = {key: head for key, head in BACKENDS.items() if any(key in result for result in results.values())}
    lines = [
        "| family | transformer | precision | " + " | ".join(shown.values()) + " |",
        "|" + "---|" * (3 + len(shown)),
    ]
    for (name, kind), result in results.items():
        cells = [name, families[name]["class"], kind, *(_cell(key, result) for key in shown)]
        lines.append("| " + " | ".join(cells) + " |")
    runs = _runs(results.values())
    return "\n".join([*lines, *([""] if runs else []), *runs]) + "\n"


def _runs(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a line for each day, machine and version that results name."""
    found = [(head, run) for result in results for key, head in BACKENDS.items() if (run := result.get(f"{key} run"))]
    lines = {
        f"{head}: {run['day']}, {run['cores']} cores of {run['cpu']}, {run['gpu'] or 'no GPU'}; "
        + ", ".join(f"{what} {version}" for what, version in run["versions"].items())
        + "."
        for head, run in found
    }
    return sorted(lines)


def _cell(key: str, result: Mapping[str, Any]) -> str:
    """Whether it was built, and the difference from torch where it was executed."""
    if key not in result:
        return "not tried"
    if result[key] != "ok":
        return str(result[key])
    if graph := result.get(f"{key} graph"):
        left = f"{len(graph['in_torch'])} of {graph['operators']} operators in torch"
        return f"{graph['engines']} engines built, {left}; graph {graph['difference']:.1e}"
    difference = result.get("difference" if key == "onnx" else f"{key} difference")
    return "built, not executed" if difference is None else f"{difference:.1e}"


def page() -> str:
    """Return docs/exporting.md with the table of now."""
    begin, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{begin}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
