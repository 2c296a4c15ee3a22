"""Trace, skip and remove on every transformer class of diffusers: `python -m docs.measurements.census [NAME ...]`.

Runs the tiny models of `tests/zoo`, removes every block alone, checks what comes out against the skip without the
library's certificate, asks for the sets that refusals name, and writes `docs/measurements/census.json`, which
`docs/measurements/support_matrix.py` reads. With names it only prints.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

import flcompress
from flcompress.errors import NotRemovable
from flcompress.ir.graph import BlockGraph
from tests.zoo import ZOO
from tests.zoo.check import answer, largest_difference, named_set, randomised
from tests.zoo.entry import Entry

HERE = Path(__file__).parent


def census(entry: Entry) -> dict[str, Any]:
    """What one model of the zoo gives."""
    started = time.process_time()
    model = randomised(entry)
    graph = flcompress.trace(model, entry.draw(0))
    full = answer(model, entry.draw(1))
    row: dict[str, Any] = {
        "model": entry.name,
        "class": entry.model_class,
        "blocks": len(graph.blocks),
        "stacks": {stack: len(blocks) for stack, blocks in graph.stacks.items()},
        "skipped": 0,
        "removed": [],
        "together": [],
        "refused": {},
        "wrong": [],
    }
    for block in graph.blocks:
        with flcompress.skip(model, [block.path]):
            skipped = answer(model, entry.draw(1))
        row["skipped"] += not all(map(torch.equal, full, skipped))
        attempt(row, entry, model, graph, (block.path,))
    row["seconds"] = round(time.process_time() - started, 1)
    return row


def attempt(row: dict[str, Any], entry: Entry, model: Any, graph: BlockGraph, paths: tuple[str, ...]) -> None:
    """Remove `paths` and file the outcome; on a refusal also the set that it names."""
    try:
        smaller = flcompress.remove(model, paths, entry.draw(0))
    except NotRemovable as error:
        row["refused"][", ".join(paths)] = str(error)
        together = named_set(paths[0], str(error))
        if len(paths) == 1 and together and sorted(together) not in row["together"]:
            attempt(row, entry, model, graph, together)
        return
    if largest_difference(entry, model, smaller, paths) != 0:
        row["wrong"].append(list(paths))
    elif len(paths) == 1:
        row["removed"].append(paths[0])
    else:
        row["together"].append(sorted(paths))


def cause(refusal: str) -> str:
    """The kind of a refusal, for counting."""
    kinds = {
        "go only together": "one config key counts several lists",
        "ask for both": "goes with a partner",
        "carries no input on": "no residual",
        "weights": "the config cannot say it: other weights",
        "config is refused": "the config cannot say it: refused",
        "differs from the skip": "the config cannot say it: other answers",
        "fails with": "the config cannot say it: the forward fails",
    }
    return next((kind for words, kind in kinds.items() if words in refusal), "other")


def totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts."""
    refused = [cause(text) for row in rows for path, text in row["refused"].items() if ", " not in path]
    return {
        "diffusers": diffusers.__version__,
        "classes": len({row["class"] for row in rows}),
        "models": len(rows),
        "blocks": sum(row["blocks"] for row in rows),
        "skipped": sum(row["skipped"] for row in rows),
        "removed": sum(len(row["removed"]) for row in rows),
        "refused": {kind: refused.count(kind) for kind in sorted(set(refused))},
        "sets removed together": sum(len(row["together"]) for row in rows),
        "wrong": sum(len(row["wrong"]) for row in rows),
        "CPU seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def main(names: list[str]) -> None:
    """Run the models named, or all of them and write the matrix."""
    warnings.simplefilter("ignore")
    rows = []
    for name in names or ZOO:
        row = census(ZOO[name])
        rows.append(row)
        print(
            f"{name:32} {row['blocks']:3} blocks, {len(row['removed']):3} removed, {len(row['together'])} sets, "
            f"{len(row['wrong'])} wrong, {row['seconds']} s",
            flush=True,
        )
    counts = totals(rows)
    print(json.dumps(counts, indent=1))
    if names:
        print(json.dumps(rows, indent=1))
    else:
        document = json.dumps({"counts": counts, "rows": rows}, indent=1) + "\n"
        (HERE / "census.json").write_text(document, encoding="utf-8")
    if counts["wrong"]:
        sys.exit("a removal is wrong")


if __name__ == "__main__":
    main(sys.argv[1:])
