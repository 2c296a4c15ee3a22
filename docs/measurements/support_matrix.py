"""Write docs/support-matrix.md from what the census and the matrices of training and export ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRECISIONS = ("fp32", "fp16", "bf16")


def page() -> str:
    """The whole page."""
    census, trained, exported = (
        json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("census", "train_matrix", "export_matrix")
    )
    counts = census["counts"]
    refused = ", ".join(f"{count} {kind}" for kind, count in counts["refused"].items())
    lines = [
        "# Support matrix",
        "",
        "Written by `python docs/measurements/support_matrix.py` from what `python -m docs.measurements.census`,",
        "`docs.measurements.train_matrix` and `docs.measurements.export_matrix`",
        f"ran on tiny random models of diffusers {counts['diffusers']}; do not edit.",
        "",
        f"Trace, skip, remove: {counts['classes']} classes, {counts['models']} models, {counts['blocks']} blocks; "
        f"{counts['skipped']} skipped; {counts['removed']} removed alone, exactly;",
        f"{counts['sets removed together']} sets removed together, exactly; {counts['wrong']} wrong.",
        f"Refused: {refused}.",
        "",
        "*Remove* means: the model without the block, saved and loaded by stock diffusers, answers exactly what the",
        "model with the block skipped answers (largest difference 0 in fp32, on inputs the removal never saw). *Train*",
        "means: clips encoded, every stage applied for a step or two, exported, loaded by the stock pipeline, and a",
        "clip made. *ONNX* agrees with torch through ONNX Runtime; *TensorRT*: the engine was built (none was run: no",
        "GPU). A dash: no pipeline adapter, so it was not tried.",
        "",
        "| Class | Blocks | Trace | Skip | Remove alone | Together | Train | ONNX | TensorRT | Why not |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = census["rows"]
    for name in sorted({row["class"] for row in rows}):
        lines.append(_line(name, [row for row in rows if row["class"] == name], trained, exported))
    return "\n".join(lines) + "\n"


def _line(name: str, mine: list[dict[str, Any]], trained: dict[str, Any], exported: dict[str, Any]) -> str:
    blocks = sum(row["blocks"] for row in mine)
    reasons = [_short(text) for row in mine for path, text in row["refused"].items() if ", " not in path]
    ways = {family: row for family, row in trained.items() if row["class"] == name}
    faults = [f"{family}: {row['train']}" for family, row in ways.items() if row["train"] != "ok"]
    cells = [
        name,
        blocks,
        "yes",
        f"{sum(row['skipped'] for row in mine)}/{blocks}",
        f"{sum(len(row['removed']) for row in mine)}/{blocks}",
        sum(len(row["together"]) for row in mine) or "",
        ", ".join(family for family, row in ways.items() if row["train"] == "ok") or "-",
        _exported(name, exported, "onnx"),
        _exported(name, exported, "tensorrt"),
        "; ".join([*dict.fromkeys(reasons), *faults]).replace("|", "\\|"),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _exported(name: str, exported: dict[str, Any], kind: str) -> str:
    """The precisions at which every pipeline of a class came through; those at which some did not are named so."""
    mine = [row for row in exported.values() if row["class"] == name]
    told = []
    for precision in PRECISIONS:
        tried = [row[precision].get(kind, "not reached") for row in mine if precision in row]
        if tried:
            good = tried.count("ok")
            told.append(precision if good == len(tried) else f"{precision} {good}/{len(tried)}")
    return ", ".join(told) or "-"


def _short(text: str) -> str:
    """A refusal without the block's own name, so that alike ones are told once."""
    _, _, why = text.partition(": ")
    return (why or text)[:160]


if __name__ == "__main__":
    (HERE.parent / "support-matrix.md").write_text(page(), encoding="utf-8")
