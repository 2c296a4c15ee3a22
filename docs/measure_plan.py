"""What `flcompress plan` says against what a training takes: python -m docs.measure_plan [SIZE ...].

For every size and engine a real pass runs a few steps on this machine's CPU, on one process (local) or two (gloo).
Memory is the resident peak of the fuller process while it trains, less what it held before the pass began; the step
time is set against the plan's with this machine's measured FLOP/s. Prints the table of docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"5M": (6, 16, 1024), "19M": (8, 24, 1536), "50M": (12, 32, 2048)}
"""Name -> layers, heads of 16 channels, hidden width."""
STEPS = 4
PASSES = {
    "pretrain": "pretrain: {steps: 4, batch: BATCH}",
    "dmd": "dmd: {steps: 4, batch: BATCH, critic_updates: 1, learning_rate: 1e-6, critic_learning_rate: 1e-6}",
}
SETTINGS = [
    ("local", 1, "fp32", False),
    ("local", 1, "fp32", True),
    ("local", 1, "bf16", False),
    ("ddp", 2, "fp32", False),
    ("zero1", 2, "fp32", False),
    ("zero2", 2, "fp32", False),
    ("zero3", 2, "fp32", False),
    ("fsdp2", 2, "fp32", False),
]


def write_recipe(home: Path, name: str, batch: int, setting: tuple[str, int, str, bool]) -> Path:
    """A recipe of one pass on random weights."""
    engine, processes, precision, checkpointing = setting
    path = home / "recipe.yaml"
    path.write_text(
        "version: 1\nmodel: model\nsampling: {max_sequence_length: 16}\ndata: {moving-digits: {clips: 80}}\n"
        f"training: {{engine: {engine}, processes: {processes}, precision: {precision}, "
        f"gradient_checkpointing: {str(checkpointing).lower()}}}\n"
        f"passes:\n  - {PASSES[name].replace('BATCH', str(batch))}\n",
        encoding="utf-8",
    )
    return path


def train(file: Path, out: Path) -> None:
    """In a process of the training: run the pass, write what it took."""
    from flcompress.pipeline.clips import Clips
    from flcompress.pipeline.display import QuietDisplay
    from flcompress.pipeline.memory import peak_mb, reset_peak
    from flcompress.pipeline.passes import Work
    from flcompress.pipeline.recipe_loading import load_recipe
    from flcompress.pipeline.start import starting_program
    from flcompress.pipeline.world import joined

    recipe = load_recipe(file)
    (step,) = recipe.passes
    program = starting_program(recipe, file.parent)
    clips = Clips(recipe, file.parent / "data", QuietDisplay(), "cpu")
    clips(program)
    if recipe.training.engine.startswith("zero"):
        import deepspeed  # noqa: F401
    base = [0.0]
    seen: list[tuple[float, float]] = []

    def progress(done: int, total: int, values: Any) -> None:
        seen.append((peak_mb() - base[0], time.perf_counter()))
        reset_peak()

    with joined(recipe.training, "cpu") as world:
        work = Work(
            directory=file.parent / "work",
            seed=0,
            data=clips,
            progress=progress,
            world=world,
            engine=recipe.training.engine,
            precision=recipe.training.precision,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
        )
        reset_peak()
        base[0] = peak_mb()
        step(program, work)
        times = [second[1] - first[1] for first, second in zip(seen, seen[1:], strict=False)]
        told = {"start": seen[0][0], "peak": max(one[0] for one in seen[1:]), "seconds": min(times)}
        out.with_name(f"{out.name}.{world.rank}").write_text(json.dumps(told), encoding="utf-8")


def measured(home: Path, file: Path, processes: int) -> dict[str, float]:
    """Run the recipe's pass; the fuller process's figures (memory in MB)."""
    out = home / "told"
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    command = [sys.executable, *launcher, "-m", "docs.measure_plan", "train", str(file), str(out)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    told = [json.loads(out.with_name(f"{out.name}.{rank}").read_text(encoding="utf-8")) for rank in range(processes)]
    return {key: max(one[key] for one in told) for key in told[0]}


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), Path(sys.argv[3]))
