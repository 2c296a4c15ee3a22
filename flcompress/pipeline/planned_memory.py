"""How much memory a pass will take, part by part. Each part is counted; none is a fitted factor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flcompress.pipeline.passes import Cost

if TYPE_CHECKING:
    from flcompress.models.families.family import LatentShape

FLOAT = 4
"""Bytes of a number: everything is trained in fp32."""
MOMENTS = 2
"""AdamW keeps two per trained parameter."""
PROCESS = 450_000_000
"""Bytes of Python, torch and diffusers with the smallest pipeline loaded (measured, see docs/benchmarks.md)."""


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """Bytes at the fullest moment of a pass.

    Attributes:
        process: the interpreter and its libraries.
        weights: of all models held at once, trained or not.
        gradients, moments: of the trained ones.
        average: moving averages of trained ones.
        activations: what autograd keeps of a batch; without training, what one block of it takes.
    """

    process: float
    weights: float
    gradients: float
    moments: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        return self.process + self.weights + self.gradients + self.moments + self.average + self.activations


def planned_memory(cost: Cost, kept: int, blocks: int) -> PlannedMemory:
    """Memory of a pass.

    Args:
        cost: what the pass says it holds.
        kept: bytes that autograd keeps of one sample, by `kept_for_backward`.
        blocks: of the transformer; without a backward only one block's share of `kept` is alive at a time.
    """
    return PlannedMemory(
        process=PROCESS,
        weights=FLOAT * (cost.trained + cost.frozen),
        gradients=FLOAT * cost.trained,
        moments=FLOAT * MOMENTS * cost.trained,
        average=FLOAT * cost.averaged,
        activations=cost.batch * kept / (1 if cost.trained else max(1, blocks)),
    )


def kept_for_backward(transformer: Path, tokens: int, shape: LatentShape) -> int:
    """Bytes that autograd keeps of a forward of one sample [1, channels, *shape]: each saved tensor once, no weights.

    Counted on fake tensors, which choose the same kernels as real ones on the CPU and hold no memory.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils._pytree import tree_map_only

    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
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

    # Some models keep plain tensors beside their weights; those may stay on the meta device.
    with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks():
        state = {name: fake(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
        inputs = tree_map_only(torch.Tensor, fake, inputs)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            torch.func.functional_call(model, state, (), inputs)
    for value in state.values():
        saved.pop(value.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in saved.values())
