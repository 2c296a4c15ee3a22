"""The one training loop. Objectives plug in as a function of the step; everything else here is bookkeeping."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flcompress.draws import generator
from flcompress.models.precision import half_precision
from flcompress.pipeline.durable import write_text
from flcompress.pipeline.passes import Precision, ProgressSink
from flcompress.training.trained import Trained

CHECKPOINT_SECONDS = 60.0
"""A killed run loses at most this much work."""

TrainStep = Callable[[int, torch.Generator], Mapping[str, float]]
Monitor = Callable[[int], Mapping[str, float]]


def train(
    train_step: TrainStep,
    roles: Sequence[Trained],
    *,
    steps: int,
    seed: tuple[object, ...],
    directory: Path,
    progress: ProgressSink,
    precision: Precision = "fp32",
    monitor: Monitor | None = None,
    monitor_every: int = 0,
) -> None:
    """Run `train_step` for `steps` steps; go on from the last checkpoint in `directory` if there is one.

    Args:
        train_step: does the updates of one step with the given generator and returns what to log.
        roles: the models it trains; they are checkpointed together.
        steps: number of steps.
        seed: the generator of step n is `draws.generator(*seed, n)`, so a resumed run draws the same.
        directory: holds `metrics.jsonl`, one object a step, and `checkpoint.safetensors`.
        progress: told after every step.
        precision: "bf16" computes under autocast; weights, losses and moments stay in fp32.
        monitor: called before the first step, then every `monitor_every` steps and after the last; what it returns is
            logged as its own line. It may raise TrainingError to stop.

    Raises:
        TrainingError: a loss was not finite or the monitor said stop. The last checkpoint stays.
    """
    device = next(roles[0].model.parameters()).device.type
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / "checkpoint.safetensors"
    log = directory / "metrics.jsonl"
    start = _restore(checkpoint, roles)
    _truncate(log, start)
    saved = time.monotonic()
    with log.open("a", encoding="utf-8") as lines:

        def write(record: Mapping[str, float]) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        if monitor is not None and start == 0:
            with half_precision(device, enabled=precision == "bf16"):
                write({"step": 0, **monitor(0)})
        for step in range(start + 1, steps + 1):
            with half_precision(device, enabled=precision == "bf16"):
                values = dict(train_step(step, generator(*seed, step)))
            write({"step": step, **values})
            progress(step, steps, values)
            if monitor is not None and (step == steps or (monitor_every and step % monitor_every == 0)):
                with half_precision(device, enabled=precision == "bf16"):
                    write({"step": step, **monitor(step)})
            if step == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
                _save(checkpoint, roles, step)
                saved = time.monotonic()


def _save(path: Path, roles: Sequence[Trained], step: int) -> None:
    tensors = {f"{role.name}/{key}": value.contiguous() for role in roles for key, value in role.checkpoint().items()}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, str(temporary), metadata={"step": str(step)})
    temporary.replace(path)


def _restore(path: Path, roles: Sequence[Trained]) -> int:
    if not path.exists():
        return 0
    with safe_open(str(path), framework="pt") as file:
        for role in roles:
            prefix = f"{role.name}/"
            role.restore({k[len(prefix) :]: file.get_tensor(k) for k in file.keys() if k.startswith(prefix)})  # noqa: SIM118
        return int(file.metadata()["step"])


def _truncate(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint: those steps will be done, and logged, again."""
    if log.exists():
        kept = [line for line in log.read_text(encoding="utf-8").splitlines() if line and _step(line) <= step]
        write_text(log, "".join(line + "\n" for line in kept))


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return 1 << 62  # the last line of a killed run can be cut in half
