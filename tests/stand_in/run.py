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
from pathlib import Path
from typing import Any
from unittest import mock


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
        results["other passes"] = _errors_of_other_passes(families[0], Path(folder) / families[0])
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
    from flcompress.training.distillation import samples, student_monitor
    from flcompress.training.loop import _Run
    from flcompress.training.role import TrainedRole
    from tests.families.whole_way import WholeWay
    from tests.stand_in.device import StandIn

    way, device = WholeWay(family, home), StandIn()
    way.prepare()

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
            way.encode()
        way.apply()
        with device.during("generate"):
            way.generate()
    return device.counts()


def _errors_of_other_passes(family: str, home: Path) -> dict[str, str]:
    """Return what failed, by what it was for, with the family whose data and first run are in `home`."""
    from tests.families.whole_way import WholeWay
    from tests.stand_in.device import StandIn

    errors: dict[str, str] = {}
    with StandIn():
        for name, call in WholeWay(family, home).others().items():
            try:
                call()
            except Exception:  # noqa: BLE001 (the test prints it)
                errors[name] = traceback.format_exc()
    return errors


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
