"""How much memory a pass will take, part by part. Each part is counted; none is a fitted factor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.pipeline.passes import Cost, Precision, Role
from flcompress.pipeline.recipe import Training

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

FLOAT, HALF = 4, 2
"""Bytes of a number. Trained weights are fp32; frozen ones and activations are of the training's precision."""
MOMENTS = 2
"""AdamW keeps two per trained parameter."""
PROCESS = 450_000_000
"""Bytes of Python, torch and diffusers with the smallest pipeline loaded (measured, see docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes at the fullest moment of a pass.

    Attributes:
        process: the interpreter and its libraries.
        roles: of each model: weights, and where it is trained gradients, moments and moving average.
        activations: what autograd keeps of a batch; without training, what one block of it takes.
    """

    process: float
    roles: Mapping[str, float]
    activations: float

    @property
    def total(self) -> float:
        return self.process + sum(self.roles.values()) + self.activations

    def parts(self) -> dict[str, float]:
        """Every part by its name, the largest first."""
        parts = {"process": self.process, **self.roles, "activations": self.activations}
        return dict(sorted(parts.items(), key=lambda part: -part[1]))


def planned_memory(cost: Cost, kept: Kept, training: Training) -> PlannedMemory:
    """Memory of a pass.

    Args:
        cost: what the pass says it holds.
        kept: what one sample keeps alive.
        training: precision and gradient checkpointing.
    """
    frozen = HALF if training.precision == "bf16" and cost.steps else FLOAT

    def held(role: Role) -> float:
        if not role.trained:
            return frozen * role.parameters
        return FLOAT * role.parameters * (2 + MOMENTS + role.averaged)  # weights and gradients, moments, average

    trained = any(role.trained for role in cost.roles)
    of_one = kept.block if not trained else kept.checkpointed if training.gradient_checkpointing else kept.whole
    return PlannedMemory(
        process=PROCESS, roles={role.name: held(role) for role in cost.roles}, activations=cost.batch * of_one
    )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that one sample keeps alive.

    Attributes:
        whole: what autograd keeps of a forward.
        block: of one block of it.
        checkpointed: the blocks' inputs, and one block while its backward computes it again.
    """

    whole: float
    block: float
    checkpointed: float


def kept_alive(transformer: Path, graph: BlockGraph, tokens: int, shape: LatentShape, precision: Precision) -> Kept:
    """Count what one sample [1, channels, *shape] keeps alive."""
    whole, inputs = kept_for_backward(transformer, tokens, shape, precision, graph)
    block = whole / max(1, len(graph.blocks))
    return Kept(whole=whole, block=block, checkpointed=inputs + block)


def kept_for_backward(
    transformer: Path, tokens: int, shape: LatentShape, precision: Precision, graph: BlockGraph
) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward of one sample [1, channels, *shape], and bytes of its blocks' streams.

    Each saved tensor counts once, weights not at all. Counted on fake tensors, which choose the same kernels as real
    ones on the CPU and hold no memory.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._pytree import tree_map_only

    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.models.precision import half_precision
    from flcompress.trace.call import named
    from flcompress.trace.running import AllTrueMasks

    model = meta_transformer(transformer)
    inputs = example_inputs(model, latent_shape=shape, tokens=tokens)

    def fake(like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, requires_grad=like.requires_grad)

    # The storages themselves are held: the address of one that is freed would name another later.
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    streams = 0

    def met(block: Block) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal streams
            given = named(module, args, kwargs)
            tensors = [given[stream.input] for stream in block.streams]
            streams += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        return hook

    for block in graph.blocks:
        model.get_submodule(block.path).register_forward_pre_hook(met(block), with_kwargs=True)
    # Some models keep plain tensors beside their weights; those may stay on the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks():
        state = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
        inputs = tree_map_only(torch.Tensor, fake, inputs)
        cast = half_precision("cpu", enabled=precision == "bf16")
        with cast, saved_tensors_hooks(note, lambda tensor: tensor):
            torch.func.functional_call(model, state, (), inputs)
    for value in state.values():
        saved.pop(value.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values()), streams
