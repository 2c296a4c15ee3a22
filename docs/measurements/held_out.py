"""Held-out evaluations of a training on two processes against the same on one: python -m docs.measurements.held_out.

A tiny model is distilled for 12 steps at a usual and at a hot rate, on one process, on one that samples as many at once
in its evaluations as each of two does, and on two over gloo. Prints rows of the table in docs/benchmarks/training.md:
the largest relative difference of any figure from those of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flcompress.files import lines_of

RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 50, max_sequence_length: 16, guidance_scale: 4.0}}
data: {{moving-digits: {{clips: 16}}}}
training: {{health: {{every: 3, on_breach: warn}}, log_to: []}}
passes:
  - dmd: {{steps: 12, critic_updates: 1, batch: 4, learning_rate: {rate}, intra_cfg: [0, 0]}}
"""
SMALLER = "SAMPLES_AT_ONCE"
"""Environment variable: how many samples the process makes at once."""


def run(recipe: Path, folder: Path, *, processes: int = 1, at_once: str = "") -> list[dict[str, float]]:
    """Apply the recipe; what was logged, but for a share of few values."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "docs.measurements.held_out", "apply", str(recipe)]
    command += ["--quiet", "--run-dir", str(folder), "--set", f"training.engine={'ddp' if processes > 1 else 'local'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", SMALLER: at_once}
    subprocess.run([sys.executable, *command], env=environment, check=True, stderr=subprocess.DEVNULL)
    (file,) = folder.glob("passes/*-dmd-*/metrics.jsonl")
    records = [json.loads(line) for line in lines_of(file.read_text(encoding="utf-8"))]
    return [{name: one for name, one in record.items() if name != "sample_saturation"} for record in records]


def differences(one: list[dict[str, float]], other: list[dict[str, float]]) -> list[float]:
    """The largest difference of each evaluation, of the first step's figures and of the last one's."""
    far = [max(abs(x[name] - y[name]) / abs(x[name]) for name in x if x[name]) for x, y in zip(one, other, strict=True)]
    evaluations = [value for value, record in zip(far, one, strict=True) if "sample_distance" in record]
    steps = [value for value, record in zip(far, one, strict=True) if "sample_distance" not in record]
    return [*evaluations, steps[0], steps[-1]]


def main() -> None:
    """Print the rows."""
    from tests.fixtures.tiny import tiny_pipeline

    print("| rate | against one process | steps 0, 3, 6, 9, 12 | | | | | step 1 | step 12 |\n" + "|---" * 9 + "|")
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        model = tiny_pipeline(home / "model", layers=4)
        for rate in ("1e-5", "1e-2"):
            recipe = home / f"{rate}.yaml"
            recipe.write_text(RECIPE.format(model=model, rate=rate), encoding="utf-8")
            whole, half, two = (
                run(recipe, home / rate / str(number), processes=processes, at_once=at_once)
                for number, (processes, at_once) in enumerate(((1, ""), (1, "2"), (2, "")))
            )
            for name, figures in (("two processes", two), ("one that samples 2 at once, not 4", half)):
                print(
                    f"| {rate} | {name} | " + " | ".join(f"{value:.1e}" for value in differences(whole, figures)) + " |"
                )
            same = differences(half, two)[0]
            print(
                f"two processes against one that samples as many at once, before the first step: {same:.1e}", flush=True
            )


def apply() -> None:
    """Run `flcompress` with another number of samples at once in held-out evaluations."""
    from flcompress import cli
    from flcompress.training.distillation import student_monitor

    if number := os.environ.get(SMALLER):
        stock = student_monitor.StudentEvaluation.__init__

        def smaller(self: student_monitor.StudentEvaluation, *args: object, **kwargs: object) -> None:
            stock(self, *args, **{**kwargs, "batch": int(number)})  # type: ignore[arg-type]

        student_monitor.StudentEvaluation.__init__ = smaller  # type: ignore[method-assign]
    cli.main()


if __name__ == "__main__":
    apply() if sys.argv[1:2] == ["apply"] else main()
