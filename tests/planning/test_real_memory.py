"""Memory of Stage II at real size, on tensors without storage, against the plan; of HunyuanVideo's blocks four."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from flcompress.frontend.loading import load_recipe
from flcompress.models.families import family_of
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import meta_transformer
from flcompress.models.network import half_precision
from flcompress.models.tensor_memory import Alive
from flcompress.planning.machines import gpu_machine
from flcompress.planning.plan import Plan, make_plan
from flcompress.tracing.running import AllTrueMasks
from flcompress.training.engines import Hyper
from flcompress.training.engines.optimiser import optimiser

pytestmark = pytest.mark.e2e

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FEW_BLOCKS = {"num_layers": 2, "num_single_layers": 2}
TOKENS = 256
ALONE = [
    "training.engine=local",
    "training.processes=1",
    "training.sequence_parallel=1",
    "passes.stochastic-depth.batch=1",
    "passes.dmd.batch=1",
]


def planned(home: Path) -> tuple[Path, Plan]:
    """Return (the transformer's folder, the plan) of the shipped recipe with fewer blocks, on one GPU."""
    folder = Path(shutil.copytree(RECIPES / "configs" / "hunyuanvideo", home / "model"))
    config = json.loads((folder / "transformer" / "config.json").read_text()) | FEW_BLOCKS
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    recipe = load_recipe(RECIPES / "hunyuanvideo.yaml", [f"model.path={folder}", *ALONE])
    return folder / "transformer", make_plan(recipe, machine=gpu_machine(recipe, "h100", 1))


def network(folder: Path, plan: Plan, *, trained: bool) -> tuple[Any, Callable[[], torch.Tensor]]:
    """Return a transformer without storage, and a call of it at the plan's size, in the precision of its kind."""
    model = meta_transformer(folder)
    inputs = example_inputs(model, latent_shape=plan.latents, tokens=TOKENS)
    single = set(model._keep_in_fp32_modules or ())
    for name, buffer in list(model.named_buffers()):
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner).register_buffer(key, torch.empty(buffer.shape, dtype=buffer.dtype))
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        dtype = torch.float32 if trained or single & set(name.split(".")) else torch.bfloat16
        weight = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=trained)
        model.get_submodule(owner).register_parameter(key, weight)
    if trained:
        model.enable_gradient_checkpointing()
        model.train()
    given = tree_map_only(torch.Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), inputs)
    if not trained:
        exact = family_of(type(model).__name__).fp32_arguments
        plain = {key: value for key, value in given.items() if isinstance(value, torch.Tensor) and key not in exact}
        given |= {key: value.bfloat16() for key, value in plain.items() if value.is_floating_point()}

    def call() -> torch.Tensor:
        with half_precision("cpu", enabled=trained), torch.set_grad_enabled(trained):
            output: torch.Tensor = model(**given, return_dict=False)[0]
        return output.float()

    return model, call


def test_stage_two_takes_no_more_than_is_planned(tmp_path: Path) -> None:
    """The plan adds the working memory of a block to what is kept, which among four blocks is a fifth of all."""
    folder, plan = planned(tmp_path)
    row = next(row for row in plan.passes if row.name == "stochastic-depth")
    with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks(), Alive() as alive:
        (model, run), (_, original) = network(folder, plan, trained=True), network(folder, plan, trained=False)
        steps = optimiser(list(model.parameters()), Hyper(learning_rate=1e-5))
        for _ in range(2):
            target = original()
            with half_precision("cpu", enabled=True):
                torch.autograd.backward((run() - target).square().mean())
            steps.step()
            steps.zero_grad(set_to_none=True)
            del target
    assert alive.most <= row.memory.total < 1.25 * alive.most
