"""The engine on torch's fully_shard (FSDP2): weights, gradients and moments are split over the processes by block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from flcompress.core.steps import PassContext
from flcompress.errors import RequestError
from flcompress.models.loading import empty_transformer
from flcompress.training.engines.engine import Engine, Hyper, WrappedModel
from flcompress.training.engines.replicated import Replica
from flcompress.training.engines.rounded import gather_rounded
from flcompress.training.parts import Part, local


class Shards(Replica):
    """A model whose parameters are DTensors; this process holds its part of each.

    Gradients are exchanged after every micro batch: held back until the last one, they would be whole in every process.
    Where groups hold copies, that is within a group; between groups their parts are exchanged once a step.
    """

    @override
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        self.model.set_requires_all_reduce(last)
        return nullcontext()

    def _norm(self) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self._named.values(), self._hyper.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @override
    def shards_changed(self) -> None:
        self.model.reshard()  # a forward without backward leaves what is outside the blocks gathered

    @override
    def full_state(self) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = {}
        for name, value in self.model.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.context.world.main:
                state[name] = full.detach().cpu().clone()
        return state

    @override
    def _part(self, weight: torch.Tensor, value: torch.Tensor) -> Part:
        if not isinstance(weight, DTensor):
            return super()._part(weight, value)
        mesh = weight.device_mesh
        first = _first_row(weight) * math.prod(weight.shape[1:])
        return Part(local(value), first, weight.numel(), copy=mesh.ndim > 1 and mesh.get_local_rank(0) > 0)


class FullySharded(Engine):
    """FSDP2 over all processes, or over those of a group, with a copy in each (`training.shard_size`)."""

    def __init__(self, context: PassContext) -> None:
        super().__init__(context)
        self.splits_weights = True
        # A transformer's last reshape makes a view; nothing here writes into a model's output.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self._device = torch.device(context.device)
        self._mesh = context.world.mesh or init_device_mesh(self._device.type, (context.world.size,))

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, unsharded: Collection[str] = ()) -> Any:
        model, stored = empty_transformer(folder, self.context.device, dtype)
        model.requires_grad_(trained)
        self._share(model, [block.path for block in self.graph(folder).blocks], unsharded)
        # Allocate memory only now, and only for this rank's rows. Not by `to_empty`, which would empty the buffers too.
        model._apply(lambda t: torch.empty_like(t, device=self._device) if t.device.type == "meta" else t)
        for name, value in model.state_dict().items():
            mine = stored[name]
            if isinstance(value, DTensor):
                mine = mine.rows(_first_row(value), len(value.to_local()))
            mine.fill(local(value))
        # Not where blocks are compiled: a compiled forward takes plain parameters.
        if trained and self.context.precision == "bf16" and not self.context.compile:
            gather_rounded(model)
        return model

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        if not isinstance(model, FSDPModule):
            self._share(model)
        return self.verify_engine(Shards(self.context, model, model, hyper), FSDPModule)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        return model

    def _share(self, model: nn.Module, blocks: Iterable[str] = (), unsharded: Collection[str] = ()) -> None:
        ignored = {model.get_parameter(name) for name in unsharded}
        for part in (*(model.get_submodule(block) for block in blocks), model):
            fully_shard(part, mesh=self._mesh, ignored_params=ignored)
        left = {name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)}
        if odd := left ^ set(unsharded):  # fully_shard is silent where it does nothing
            raise RequestError(f"training.engine: fsdp2 left {min(odd)} of {type(model).__name__} unshared; use ddp")


def _first_row(value: DTensor) -> int:
    """Return the first row of this process's part. As torch.chunk: equal parts, the last ones smaller or empty."""
    rows, mesh = len(value), value.device_mesh
    axis = mesh.ndim - 1
    return min(mesh.get_local_rank(axis) * -(-rows // mesh.size(axis)), rows)
