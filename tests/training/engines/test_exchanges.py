"""Bytes of the collectives in real steps against the plan's, to the byte."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flcompress.driver.start import read_source
from flcompress.frontend.loading import load_recipe
from flcompress.models.loading import meta_transformer
from flcompress.planning.exchanges import Group, Sent, TransformerShapes, plan_exchanges
from flcompress.planning.plan import data_latents, split_clip
from tests.training.home import Home
from tests.training.processes import run

pytestmark = pytest.mark.slow

PRETRAIN = "pretrain: {steps: 3, batch: 8}"
# No step before the sampled one, so that every step makes the same calls.
MATCHING = "dmd: {steps: 3, batch: 4, student_steps: 1, critic_updates: 2}"

_WHOLE = {"allreduce_": 0, "_allgather_base_": 0, "_reduce_scatter_base_": 1, "alltoall_base_": 1}
"""Collective -> which of its arguments is the whole tensor; of an all-to-all, what this process has."""


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of weights, gradients and tokens in torch's collectives.

    Not those of scalars (losses and norms), of which parameters were used (int32), of figures (float64) and of a split
    clip's prediction, whose rows have three axes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::")
        if name in _WHOLE:
            whole = args[_WHOLE[name]]
            for tensor in whole if isinstance(whole, list | tuple) else [whole]:
                counts = tensor.numel() > 1 and tensor.dtype not in (torch.int32, torch.float64)
                if counts and (name != "alltoall_base_" or tensor.ndim > 3):
                    self.bytes[name] += tensor.nbytes
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class CountSteps:
    """Leave the bytes of every training step in `file`, a line each."""

    file: str

    def __call__(self) -> None:
        from flcompress.training import loop

        stock = loop._Run.step

        def step(self_: Any, *given: Any) -> Any:
            with Collectives() as collectives:
                result = stock(self_, *given)
            with Path(self.file).open("a", encoding="utf-8") as file:
                file.write(json.dumps(collectives.bytes) + "\n")
            return result

        vars(loop)["_Run"].step = step


def counted(home: Home, name: str, step: str, processes: int, *settings: str) -> Sent:
    """Train on several processes, in groups of two; return what one of them sent in the last step."""
    folder = home.begun(home.folder / f"exchanges-{name}")
    sets = [word for setting in settings for word in ("--set", f"training.{setting}")]
    file = folder.with_name(f"{folder.name}.jsonl")
    run(
        ["apply", home.recipe(name, [step]), "--run-dir", folder, "--quiet", *sets],
        folder.with_name(f"{folder.name}-output"),
        processes=processes,
        hooks={0: CountSteps(str(file))},
    )
    _, before, last = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert before == last  # the first one also gathers what then stays
    print(name, last)
    group, total = Group(2, 2), Sent()
    for collective, size in last.items():
        count = {"allreduce_": group.reduce, "alltoall_base_": group.transpose}.get(collective, group.gather)
        total += count(size)
    return total


def planned(home: Home, name: str, step: str, processes: int, *settings: str) -> Sent:
    """Return what is planned that one process sends in a step."""
    recipe = load_recipe(home.recipe(name, [step]), [f"training.{setting}" for setting in settings])
    source, training = read_source(recipe), recipe.training
    graph, model, shape = source.graph, meta_transformer(source.transformer), data_latents(recipe)
    assert shape is not None
    cost = recipe.passes[0].cost(float(graph.parameters), len(graph.blocks), float(graph.parameters))
    exchanges = plan_exchanges(
        cost,
        training,
        TransformerShapes.of(model, graph),
        split_clip(model, graph, source.contract.max_sequence_length, shape),
        processes=processes,
        precision=training.precision,
    )
    return exchanges.hidden + exchanges.waiting


@pytest.mark.parametrize(
    ("name", "step", "settings"),
    [
        ("ddp", PRETRAIN, ["engine=ddp", "micro_batch=2"]),
        ("zero1", PRETRAIN, ["engine=zero1", "micro_batch=2"]),
        ("zero2", PRETRAIN, ["engine=zero2", "micro_batch=2"]),
        # Not with models that only compute: ZeRO-3 keeps what it gathered of as few numbers as these have.
        ("zero3", PRETRAIN, ["engine=zero3", "micro_batch=1", "gradient_checkpointing=true"]),
        ("fsdp2", MATCHING, ["engine=fsdp2", "micro_batch=1", "gradient_checkpointing=true"]),
        ("fsdp2-rounded", PRETRAIN, ["engine=fsdp2", "precision=bf16"]),
        ("fsdp2-copies", PRETRAIN, ["engine=fsdp2", "shard_size=2", "micro_batch=1"]),
        ("clip", MATCHING, ["engine=ddp", "sequence_parallel=2", "micro_batch=2", "gradient_checkpointing=true"]),
        ("clip-rounded", PRETRAIN, ["engine=ddp", "sequence_parallel=2", "precision=bf16"]),
    ],
)
def test_processes_send_what_is_planned(home: Home, name: str, step: str, settings: list[str]) -> None:
    processes = 4 if "shard_size=2" in settings else 2
    assert counted(home, name, step, processes, *settings) == planned(home, name, step, processes, *settings)
