"""Take tiny pipelines through every part of the package on the stand-in device; write what it counted.

python -m tests.stand_in.run OUT.json FAMILY...
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

CLIPS = 5
RECIPE = """
version: 1
model: {{path: {model}}}
sampling:
  {{num_inference_steps: 2, guidance_scale: {guidance}, max_sequence_length: 16, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
data: {{latents: {data}}}
training: {{precision: bf16, health: {{on_breach: warn, samples: 1}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 1, batch: 8}}
  - stochastic-depth: {{remove: 0.1, steps: 1, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{inter_cfg: [{guidance}, {guidance}], intra_cfg: [0.0, 0.5], student_steps: 2, steps: 1, critic_updates: 1,
      batch: 2}}
  - consistency: {{levels: 2, guidance: {guidance}, student_steps: 2, steps: 1, batch: 2}}
exports: [diffusers]
"""
FIRST = """
  - importance: {draws: 8, noise_levels: 1, batch: 8}
  - stochastic-depth: {remove: 0.1, steps: 1, batch: 2}
  - prune: {remove: 0.1}
"""
DMD = "inter_cfg: [2, 2], student_steps: 2, steps: 1, critic_updates: 1, batch: 2"
OTHER_PASSES = {
    "adversarial-term": FIRST + f"  - dmd: {{{DMD}, gan_weight: 0.03}}",
    "both-roles-as-loras": FIRST
    + f"  - dmd: {{{DMD}, gan_weight: 0.03, fake_score: lora, generator: lora, lora_rank: 2, real_lean: 0.2}}",
    "one-base-for-all-roles": FIRST
    + f"  - dmd: {{{DMD}, real_score: elastic, fake_score: lora, generator: lora, lora_rank: 2}}",
    "recovery-by-features": """
  - temporal-attention: {draws: 8, noise_levels: 1}
  - prune: {remove: 0.1, by: temporal-attention}
  - feature-distill: {steps: 1, batch: 2}
""",
    "joint-selection": """
  - select: {remove: 0.1, draws: 16, candidates: 2, recover: 1, recover_batch: 2, batch: 2}
  - prune: {remove: 0.1, by: joint}
""",
    "pretraining": "  - pretrain: {steps: 1, batch: 2}",
}
"""What a recipe may do otherwise, for one family: passes by what they are for."""


def main(out: Path, families: list[str]) -> None:
    """Write family -> counts to `out`, or family -> {"error": ...}."""
    with tempfile.TemporaryDirectory() as folder:
        from tests.stand_in.hooks import register

        register(Path(folder))  # before all that imports torch
        results: dict[str, Any] = {
            "refused": _refused(),
            "autocast": _autocast(),
            "offload": _offload(Path(folder) / "offload"),
        }
        for family in families:
            try:
                results[family] = _counts(family, Path(folder) / family)
            except Exception:  # noqa: BLE001 (the test prints it)
                results[family] = {"error": traceback.format_exc()}
        results["other passes"] = _errors_of_other_passes(Path(folder) / families[0])
    out.write_text(json.dumps(results))


def _refused() -> list[str]:
    """Return which mistakes the device refuses, as a real one does."""
    import torch

    from tests.stand_in.device import StandIn

    with StandIn():
        here, there = torch.ones(3, device="cuda"), torch.ones(3)
        mistakes: dict[str, Callable[[], Any]] = {
            "mixture": lambda: here + there,
            "weight": lambda: torch.nn.Linear(3, 3)(here),
            "index": lambda: there[torch.zeros(2, dtype=torch.long, device="cuda")],
            "generator": lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            "numpy": here.numpy,
        }
        allowed: dict[str, Callable[[], Any]] = {
            "number": lambda: here * torch.tensor(2.0),
            "host index": lambda: here[torch.zeros(2, dtype=torch.long)],
        }
        return [name for name, call in {**mistakes, **allowed}.items() if _fails(call)]


def _autocast() -> dict[str, list[str]]:
    """Return function -> the dtype of its result in autocast of CUDA, of the plan's copy of it, and of the CPU."""
    from contextlib import nullcontext

    import torch
    import torch.nn.functional as F

    from flcompress.models.network import CudaAutocast, half_precision
    from tests.stand_in.device import StandIn

    calls: dict[str, Callable[[Any], Any]] = {
        "rms_norm": lambda x: F.rms_norm(x, (4,)),
        "layer_norm": lambda x: F.layer_norm(x, (4,)),
        "group_norm": lambda x: F.group_norm(x, 2),
        "softmax": lambda x: x.softmax(-1),
        "pow": lambda x: x.pow(2),
        "power": lambda x: x**2,
        "rsqrt": torch.rsqrt,
        "exp": torch.exp,
        "linear": lambda x: F.linear(x, x),
        "matmul": lambda x: x @ x,
        "silu": F.silu,
        "gelu": F.gelu,
        "product": lambda x: x * x.float(),
    }
    dtypes: dict[str, list[str]] = {name: [] for name in calls}
    for device, rules in (("cuda", StandIn()), ("cpu", CudaAutocast()), ("cpu", nullcontext())):
        with rules, half_precision(device, enabled=True):
            x = torch.ones(4, 4, dtype=torch.bfloat16, device=device)
            for name, call in calls.items():
                dtypes[name].append(str(call(x).dtype))
    return dtypes


def _offload(folder: Path) -> Any:
    """Train a transformer with and without offload; return what each has, where what waits is, and what moved."""
    from dataclasses import replace

    import torch

    from flcompress.draws import Draws
    from flcompress.models.inputs import example_inputs
    from flcompress.training.engines import Hyper
    from flcompress.training.engines.replicated import Local
    from flcompress.training.role import TrainedRole
    from tests.fixtures.gaussian import work_in
    from tests.fixtures.tiny import tiny_pipeline
    from tests.stand_in.device import StandIn

    transformer = tiny_pipeline(folder / "model", layers=2) / "transformer"
    rows: list[dict[str, Any]] = []
    for offload in ((), ("moments", "inputs")):
        device = StandIn()
        with device:
            work = replace(work_in(folder), device="cuda", gradient_checkpointing=True, offload=offload)
            engine = Local(work)
            model, hyper = engine.load_trained(transformer), Hyper(learning_rate=0.01)
            role = TrainedRole(engine, "model", model, batch=1, hyper=hyper, ema_decay=0.9)
            for step in range(2):
                torch.manual_seed(step)
                inputs = {
                    name: value.to("cuda")
                    for name, value in example_inputs(model, batch=1, latent_shape=(3, 8, 8), tokens=4).items()
                }

                def loss(draws: Draws, model: Any = role.module, inputs: Any = inputs) -> torch.Tensor:
                    value: torch.Tensor = model(**inputs, return_dict=False)[0].square().mean()
                    return value

                with device.during("update"):
                    role.update(Draws("offload", batch=1), loss)
            parts = {name: part.tensor for name, part in role.parts().items()}
            sums = {name: tensor.detach().cpu().double().flatten().tolist() for name, tensor in parts.items()}
            where = {name: tensor.device.type for name, tensor in parts.items()}
            lines = {line.split(":")[0] for _, line, _ in device.uploads}
            rows.append({"held": sums, "where": where, "uploads": sorted(lines)})
    return rows


def _fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (RuntimeError, TypeError):
        return True
    return False


def _counts(family: str, home: Path) -> Any:
    from flcompress.core.steps import Pass
    from flcompress.data.encoding import encode, folder_request
    from flcompress.driver.manager import apply
    from flcompress.progress import QuietDisplay
    from flcompress.runtime.generate import generate
    from flcompress.training.distillation import samples, student_monitor
    from flcompress.training.loop import _Run
    from flcompress.training.role import TrainedRole
    from tests.families.pipelines import TINY, save
    from tests.fixtures.video_files import write_video
    from tests.stand_in.device import StandIn

    tiny, model = TINY[family], save(family, home / "model")
    frames, height, width = tiny.size
    for number in range(CLIPS):
        write_video(home / "videos" / f"{number}.mp4", frames=frames, height=height, width=width, seed=number)
    rows = [{"file": f"{number}.mp4", "caption": "a three drifting up"} for number in range(CLIPS)]
    (home / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, data=home / "data", size=tiny.size, guidance=tiny.guidance))
    device = StandIn()

    def phased(function: Callable[..., Any], name: Callable[[Any], str]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            with device.during(name(self)):
                return function(self, *args, **kwargs)

        return call

    gc.freeze()  # collections between passes are not to walk over what was imported
    with (
        device,
        mock.patch.object(student_monitor, "REDRAWS", 0),  # the same calls many times over
        mock.patch.object(samples, "TEACHER_REDRAWS", 0),
        mock.patch.object(Pass, "__call__", phased(Pass.__call__, lambda step: str(step.name))),
        mock.patch.object(TrainedRole, "update", phased(TrainedRole.update, lambda role: f"update of {role.name}")),
        mock.patch.object(_Run, "evaluate", phased(_Run.evaluate, lambda run: "evaluation")),
    ):
        with device.during("encode"):
            request = folder_request(
                model, home / "captions.jsonl", home / "data", home / "videos", max_sequence_length=16
            )
            encode(request, QuietDisplay())
        run = apply(recipe, home / "run", display=QuietDisplay())
        with device.during("generate"):
            generate(run.path, "a three drifting up", "torch", home / "out.gif", seed=0)
    return device.counts()


def _errors_of_other_passes(home: Path) -> dict[str, str]:
    """Return what failed, by what it was for, with the family whose data and first run are in `home`."""
    from flcompress import commands
    from flcompress.driver.manager import apply
    from flcompress.progress import QuietDisplay
    from tests.stand_in.device import StandIn

    start = (home / "recipe.yaml").read_text().partition("passes:")[0]
    errors: dict[str, str] = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:  # noqa: BLE001 (the test prints it)
            errors[name] = traceback.format_exc()

    with StandIn():
        for name, passes in OTHER_PASSES.items():
            recipe = home / f"{name}.yaml"
            recipe.write_text(f"{start}passes:\n{passes}\nexports: [diffusers]\n")
            attempt(name, partial(apply, recipe, home / name, store=home / "run", display=QuietDisplay()))
        attempt(
            "frame-local attention",
            lambda: commands.generate(home / "recovery-by-features", "a", out=home / "local.gif", frame_local=0.3),
        )
        attempt(
            "evaluation by proxies", lambda: commands.evaluate(home / "run", suite="proxies", display=QuietDisplay())
        )
        attempt("timing", lambda: commands.bench(home / "run", rounds=1, display=QuietDisplay()))
    return errors


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
