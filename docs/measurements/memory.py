"""Peak memory of distribution matching with and without shared weights: python -m docs.measurements.memory [MODEL ...].

The first line is three full copies with torch's optimiser as it comes, the others are of this package; each is a
process of its own that makes the roles and takes two whole steps. Two measures, both over what the
process held before the roles were made: bytes of the tensors alive, counted as torch makes and frees them, which is the
same on every run; and resident memory, which is what the system charges and moves with the allocator. Inside a kernel
nothing is counted. `MODEL` is teacher (the embedded benchmark's, batch 16) or large (random, batch 2).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
LARGE = {"layers": 16, "heads": 40, "feed_forward": 2560, "vae_channels": 4}
NAIVE = "three full copies, torch's AdamW"
ROLES: dict[str, dict[str, Any]] = {
    NAIVE: {},
    "three full copies": {},
    "LoRA critic": {"fake_score": "lora"},
    "LoRA critic, rank 16": {"fake_score": "lora", "lora_rank": 16},
    "both LoRA": {"fake_score": "lora", "generator": "lora"},
    "both LoRA on one base": {"fake_score": "lora", "generator": "lora", "real_score": "elastic"},
}
MODES: dict[str, dict[str, Any]] = {
    "": {},
    "checkpointing": {"gradient_checkpointing": True},
    "checkpointing, bf16": {"gradient_checkpointing": True, "precision": "bf16"},
}
BATCH = {"teacher": 16, "large": 2}
MICRO: dict[str, dict[str, Any]] = {f"micro batch {size}": {"micro_batch": size} for size in (8, 4, 2, 1)}
"""Modes of the teacher alone."""


def recipe_of(model: str, folder: Path, roles: dict[str, Any], training: dict[str, Any]) -> Path:
    """A recipe that cuts the model without training and distils for two steps."""
    dmd = {"steps": 2, "batch": BATCH[model], "critic_updates": 1, "student_steps": 2, **roles}
    source = ROOT / "recipes/moving-digits/teacher" if model == "teacher" else folder / "model"
    recipe = {
        "version": 1,
        "model": {"path": str(source)},
        "sampling": {"max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 32}},
        "training": training,
        "passes": [{"prune": {"remove": 0.3, "by": "middle"}}, {"dmd": dmd}],
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def child(model: str, folder: Path, name: str, training: dict[str, Any]) -> dict[str, float]:
    """Two steps; every figure in bytes."""
    import psutil
    import torch

    from flcompress.core.steps import PassContext
    from flcompress.diffusion.student import student_contract
    from flcompress.draws import Draws
    from flcompress.driver.clips import Clips
    from flcompress.driver.rundir import RunDirectory
    from flcompress.files import peak_mb, reset_peak
    from flcompress.frontend.loading import load_recipe
    from flcompress.models.tensor_memory import Alive
    from flcompress.passes.dmd import DistributionMatching
    from flcompress.progress import QuietDisplay
    from flcompress.training.distillation.roles import Roles
    from flcompress.training.engines import engine_of, replicated
    from flcompress.training.shared_base import LoRA

    if name == NAIVE:
        vars(replicated)["optimiser"] = lambda parameters, hyper: torch.optim.AdamW(
            parameters, lr=hyper.learning_rate, betas=hyper.betas, foreach=True
        )
    recipe = load_recipe(recipe_of(model, folder, ROLES[name], training))
    program = RunDirectory(folder / "run").final()
    step = recipe.passes[1]
    assert isinstance(step, DistributionMatching)
    data = Clips(recipe, folder / "data", QuietDisplay(), "cpu")
    data(program)
    work = PassContext(directory=folder, seed=0, data=data, progress=lambda *_: None, **training)
    contract = student_contract(program.teacher_contract, step.student_steps, program.family.sigmas)
    alive, before = Alive(count_stored=True), psutil.Process().memory_info().rss
    reset_peak()
    with alive:
        made = Roles(step.settings, program, contract, engine_of(work))
        for number in (1, 2):
            with made.engine.forward_mode():
                made.step(number, Draws(0, "memory", number, batch=step.batch))
    base = list(made.teacher.parameters())
    for role in made.trained:
        if isinstance(role.model, LoRA):
            base += vars(role.model)["inner"].parameters()
    return {
        "weights": _bytes([*base, *(one for role in made.trained for one in role.model.parameters())]),
        "trained": _bytes(one for role in made.trained for one in role.model.parameters()),
        "moments": _bytes(
            value for role in made.trained for key, value in role.checkpoint().items() if key.startswith("optimizer.")
        ),
        "average": _bytes(value for role in made.trained for value in (role._ema or {}).values()),
        "alive": alive.most,
        "rss": peak_mb() * 1e6 - before,
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())


def measure(model: str) -> None:
    """Print the table of one model."""
    from flcompress.driver.manager import apply
    from flcompress.models.loading import initialise_pipeline
    from flcompress.moving_digits.blank_pipeline import write_blank
    from flcompress.progress import QuietDisplay

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if model == "large":
            write_blank(folder / "blank", **LARGE)
            initialise_pipeline(folder / "blank", folder / "model", 0)
        recipe = recipe_of(model, folder, {}, {})
        cut = json.loads(recipe.read_text())
        cut["passes"] = cut["passes"][:1]
        recipe.write_text(json.dumps(cut))
        apply(recipe, folder / "run", display=QuietDisplay(), device="cpu")
        print(f"\n{model}, batch {BATCH[model]}, MB (10^6 bytes) over the process before")
        print("| roles | mode | weights | moments, average | gradients, activations, temporaries | peak | of naive | "
              "resident | of naive |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
        naive: dict[str, float] = {}
        for mode, training in (MODES | MICRO if model == "teacher" else MODES).items():
            for name in ROLES:
                told = subprocess.run(
                    [sys.executable, "-m", "docs.measurements.memory", "--child", model, place, name,
                     json.dumps(training)],
                    check=True, capture_output=True, text=True, cwd=ROOT,
                )  # fmt: skip
                found = json.loads(told.stdout.splitlines()[-1])
                naive = naive or found
                kept = found["moments"] + found["average"]
                rest = found["alive"] - found["weights"] - kept
                sizes = (found["weights"], kept, rest, found["alive"])
                cells = [name, mode, *(f"{size / 1e6:.0f}" for size in sizes),
                         f"{found['alive'] / naive['alive']:.3f}", f"{found['rss'] / 1e6:.0f}",
                         f"{found['rss'] / naive['rss']:.3f}"]  # fmt: skip
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model, place, name, training = sys.argv[2:]
        print(json.dumps(child(model, Path(place), name, json.loads(training))))
    else:
        for model in sys.argv[1:] or BATCH:
            measure(model)
