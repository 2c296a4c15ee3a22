"""Held-out quality of a benchmark run's student in 8 bits: python -m docs.measurements.quantised_quality RUN.

Writes the diffusers export in bf16 and in each quantisation to a temporary folder, loads each as stock diffusers does,
and judges it next to the run's student in fp32 on the same prompts and noises. Prints rows of the table in
docs/benchmarks/quality.md; in brackets the difference from fp32, paired over evaluation seeds. Needs torchao.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from flcompress.core.records.exports import Quantization
from flcompress.driver.rundir import RunDirectory
from flcompress.evaluation.comparison import evaluate_contenders
from flcompress.evaluation.contenders import Contender, run_contenders
from flcompress.exporters.shared.pipeline_folder import write_pipeline
from flcompress.progress import QuietDisplay
from flcompress.runtime.torch_session import TorchSession

METRICS = {
    "frechet": "{:.2f}",
    "frechet_fixed": "{:.2f}",
    "prompt_accuracy": "{:.3f}",
    "identity": "{:.3f}",
    "average": "{:.3f}",
}
CLIPS_PER_PROMPT, SEEDS = 2, 4


def contenders(run: RunDirectory, place: Path) -> list[Contender]:
    """The student in fp32, in bf16 and in every quantisation."""
    (student,) = (one for one in run_contenders(run) if one.name == "student")
    found = [student]
    for quantization in (None, *get_args(Quantization)):
        name = quantization or "bf16"
        folder = place / name
        folder.mkdir()
        with QuietDisplay().stage(name) as progress:
            write_pipeline(run.final(), folder, progress, "bf16", quantization)
        session = TorchSession(folder / "transformer", "cpu", precision="bf16")
        print(f"{name}: {session.nbytes / 1e6:.2f} MB of weights", file=sys.stderr)
        found.append(replace(student, name=name, network=session, identity=""))
    return found


def main() -> None:
    """Measure, and print the rows."""
    run = RunDirectory(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as place:
        chosen = contenders(run, Path(place))
        results, _ = evaluate_contenders(
            chosen, parts=run.final().parts(), clips_per_prompt=CLIPS_PER_PROMPT, seeds=SEEDS
        )
    pairs: dict[tuple[str, str], Any] = {
        (pair["a"], pair["metric"]): pair for pair in results["paired"] if pair["b"] == "student"
    }
    for row in results["contenders"]:
        cells = []
        for metric, form in METRICS.items():
            cell = form.format(row[metric]["mean"])
            if pair := pairs.get((row["name"], metric)):
                signed = form.replace(":", ":+")
                mean, low, high = (signed.format(pair[name]) for name in ("mean", "low", "high"))
                cell += f"; {mean} [{low}, {high}]"
            cells.append(cell)
        print(f"| {row['name']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
