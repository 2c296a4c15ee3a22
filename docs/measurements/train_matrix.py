"""A tiny random pipeline of every family through every stage: `python -m docs.measurements.train_matrix [FAMILY ...]`.

Writes what came of it to train_matrix.json. A step or two of training show that a family is wired, not how well
it learns.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from flcompress.errors import FlcompressError
from flcompress.models.configs import read_json
from tests.families.pipelines import TINY, save
from tests.families.test_apply import all_the_way

OUT = Path(__file__).with_name("train_matrix.json")


def row(name: str) -> dict[str, str]:
    """Classes of a family's pipeline, and "ok" or the reason."""
    with tempfile.TemporaryDirectory() as made:
        folder = save(name, Path(made) / "pipeline")
        index = read_json(folder / "model_index.json", "")
        found = {"class": index["transformer"][1], "pipeline": index["_class_name"]}
        try:
            all_the_way(folder, name, Path(made))
        except (FlcompressError, AssertionError) as error:
            return found | {"train": str(error).partition("\n")[0].replace(made, "")}
        return found | {"train": "ok"}


def main(*names: str) -> None:
    """Write a row for each family; what was found of others stays."""
    table = json.loads(OUT.read_text(encoding="utf-8")) if OUT.is_file() else {}
    for name in names or list(TINY):
        table[name] = row(name)
        print(name, json.dumps(table[name]), flush=True)
        OUT.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
