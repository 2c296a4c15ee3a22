"""What `flcompress plan` says against what a training takes.

`python -m docs.measurements.plan [SIZE:PASS:BATCH:ENGINE ...]`: a real pass runs a few steps on random weights on this
machine's CPU, on one process (local) or two (gloo), one thread each. Memory is the resident peak of the fuller process
from the second step on, less what it held before the pass; time is processor time, which other work on the machine
disturbs least. Prints rows of the table in docs/benchmarks/planning.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SIZES = {"5M": (6, 16, 1024), "19M": (8, 24, 1536), "50M": (12, 32, 2048)}
"""Name -> layers, heads of 16 channels, hidden width."""
PASSES = {
    "pretrain": "pretrain: {steps: 3, batch: BATCH}",
    "dmd": "dmd: {steps: 3, batch: BATCH, critic_updates: 1, learning_rate: 1e-6, critic_learning_rate: 1e-6}",
}
ENGINES = ("local", "local-again", "local-bf16", "ddp", "zero1", "zero2", "zero3", "fsdp2")
DEFAULT = [f"{size}:dmd:{batch}:{engine}" for size, batch in (("5M", 32), ("19M", 4), ("50M", 4)) for engine in ENGINES]


def write_recipe(home: Path, case: str) -> Path:
    """The recipe of one case: SIZE:PASS:BATCH:ENGINE; `local-again` is with gradient checkpointing, `ddp-4` by four."""
    _, name, batch, engine = case.split(":")
    kind, _, more = engine.partition("-")
    path = home / "recipe.yaml"
    path.write_text(
        "version: 1\nmodel: model\nsampling: {max_sequence_length: 16}\ndata: {moving-digits: {clips: 80}}\n"
        f"training: {{engine: {kind}, processes: {1 if kind == 'local' else 2}, "
        f"precision: {'bf16' if more == 'bf16' else 'fp32'}, gradient_checkpointing: {str(more == 'again').lower()}, "
        f"micro_batch: {more if more.isdecimal() else 'null'}}}\n"
        f"passes:\n  - {PASSES[name].replace('BATCH', batch)}\n",
        encoding="utf-8",
    )
    return path


def train(file: Path, out: Path) -> None:
    """In a process of the training: run the pass, write what it took."""
    from flcompress.core.steps import PassContext
    from flcompress.distributed.launch import Launch, join
    from flcompress.driver.clips import Clips
    from flcompress.driver.start import read_source, starting_program
    from flcompress.files import peak_mb, reset_peak
    from flcompress.frontend.loading import load_recipe
    from flcompress.progress import QuietDisplay

    recipe = load_recipe(file)
    (step,) = recipe.passes
    program = starting_program(recipe, read_source(recipe), file.parent)
    clips = Clips(recipe, file.parent / "data", QuietDisplay(), "cpu")
    clips(program)
    if recipe.training.engine.startswith("zero"):
        import deepspeed  # noqa: F401
    base = 0.0
    seen: list[tuple[float, float]] = []

    def progress(done: int, total: int, values: Any) -> None:
        seen.append((peak_mb() - base, time.process_time()))
        reset_peak()

    with join(recipe.training.engine, recipe.training.timeout, "cpu", Launch.from_environment()) as world:
        work = PassContext(
            directory=file.parent / "work",
            seed=0,
            data=clips,
            progress=progress,
            world=world,
            engine=recipe.training.engine,
            precision=recipe.training.precision,
            gradient_checkpointing=recipe.training.gradient_checkpointing,
            micro_batch=recipe.training.micro_batch,
        )
        reset_peak()
        base = peak_mb()
        step(program, work)
        seconds = min(after - before for (_, before), (_, after) in pairwise(seen))
        told = {"MB": max(memory for memory, _ in seen[1:]), "seconds": seconds}
        out.with_name(f"{out.name}.{world.rank}").write_text(json.dumps(told), encoding="utf-8")


def measured(home: Path, file: Path, processes: int) -> dict[str, float]:
    """Run the recipe's pass; the fuller process's MB, the busier one's processor seconds a step."""
    out = home / "told"
    shutil.rmtree(home / "work", ignore_errors=True)
    (home / "work").mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*(launcher if processes > 1 else []), "-m", "docs.measurements.plan", "train", str(file), str(out)]
    # Freed memory goes back to the system at once, so that the resident size is what is alive.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{file.read_text(encoding='utf-8')}\n{done.stderr[-3000:]}")
    told = [json.loads(out.with_name(f"{out.name}.{rank}").read_text(encoding="utf-8")) for rank in range(processes)]
    return {key: max(one[key] for one in told) for key in told[0]}


def planned(file: Path) -> dict[str, float]:
    """The plan's MB of one process, and seconds a step at the FLOP/s that this one reaches in processor time."""
    import torch

    from flcompress.driver.start import read_source
    from flcompress.frontend.loading import load_recipe
    from flcompress.planning.machines import measure_speed
    from flcompress.planning.plan import make_plan

    torch.set_num_threads(1)
    recipe = load_recipe(file)
    source = read_source(recipe)
    tokens, shape = source.contract.max_sequence_length, source.latents[1:]
    speed = measure_speed(source.folder / "transformer", source.graph, tokens, shape, time.process_time)
    (row,) = make_plan(recipe, flops_per_second=speed).passes
    return {"MB": (row.memory.total - row.memory.process) / 1e6, "seconds": row.seconds / row.steps}


def main(cases: list[str]) -> None:
    """Print a row for each case."""
    from flcompress.models.loading import initialise_pipeline
    from flcompress.moving_digits.blank_pipeline import write_blank

    print("| model | pass, batch | engine | MB planned | measured | error | s a step planned | measured | error |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as made:
        for case in cases:
            size, name, batch, engine = case.split(":")
            home = Path(made) / size
            if not home.exists():
                layers, heads, hidden = SIZES[size]
                write_blank(home / "blank", layers=layers, heads=heads, feed_forward=hidden, vae_channels=4)
                initialise_pipeline(home / "blank", home / "model", 0)
            file = write_recipe(home, case)
            plan, real = planned(file), measured(home, file, 1 if engine.startswith("local") else 2)
            columns = [
                f"{plan[key]:.{digits}f} | {real[key]:.{digits}f} | {plan[key] / real[key] - 1:+.0%}"
                for key, digits in (("MB", 0), ("seconds", 2))
            ]
            print(f"| {size} | {name}, {batch} | {engine} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(sys.argv[1:] or DEFAULT)
