"""Do weight-free figures order models as the embedded benchmark's judge does?

`python -m docs.measurements.agreement SWEEP`, where SWEEP is the folder of a finished sweep on moving digits whose
base's first run, RUN, has been evaluated twice: `flcompress eval RUN`, and `flcompress eval RUN --suite proxies` with
the other cells' first runs next to it (`--against SWEEP/cells/NAME/seed-0/run`, once for each).

Prints Spearman's rank correlation over all contenders, of every figure with every judged one, each so signed that
higher is better; a figure that is good where it is real is compared by its distance from the real clips'.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from scipy.stats import spearmanr  # type: ignore[import-untyped]

from flcompress.core.records import EvalFile, Measured, SweepFile
from flcompress.evaluation.suites.proxies import Proxies

JUDGED = {"frechet": -1, "frechet_fixed": -1, "prompt_accuracy": 1, "identity": 1, "average": 1}
"""Figure of the embedded judge -> 1 where higher is better, -1 where lower is."""


def main(sweep: Path) -> None:
    """Print the table."""
    cells = SweepFile.read(sweep / "results.json")
    run = sweep / "cells" / cells.base / "seed-0" / "run"
    judge, proxies = (
        EvalFile.read(run / "eval" / "results.json"),
        EvalFile.read(run / "eval" / "proxies" / "results.json"),
    )
    judged: dict[str, Mapping[str, Measured]] = {row.name: row.figures for row in judge.contenders}
    judged |= {f"{cell.name}-0": cell.figures for cell in cells.cells if cell.name != cells.base}
    rows = {row.name: row.figures for row in proxies.contenders if row.name in judged}
    print(f"{len(rows)} models: {', '.join(rows)}\n")
    print("| figure | " + " | ".join(f"`{name}`" for name in JUDGED) + " |")
    print("|---" * (1 + len(JUDGED)) + "|")
    for figure in Proxies.figures:
        real = proxies.floor.get(figure.key)
        names = [name for name, figures in rows.items() if figure.key in figures]
        if len(names) < len(rows) or (figure.better == 0 and real is None):
            continue
        ours = [
            figure.better * rows[name][figure.key].mean
            if figure.better or real is None
            else -abs(rows[name][figure.key].mean - real.mean)
            for name in names
        ]
        found = [
            spearmanr(ours, [sign * judged[name][key].mean for name in names]).statistic for key, sign in JUDGED.items()
        ]
        print(f"| `{figure.key}` | " + " | ".join(f"{value:+.2f}" for value in found) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
