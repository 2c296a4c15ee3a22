"""torch's fully_shard (FSDP2): weights, gradients and moments are split over the processes, block by block."""

from __future__ import annotations

import json
import warnings
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flcompress.errors import RequestError
from flcompress.pipeline.passes import Work
from flcompress.trace.skip import graph_of
from flcompress.training.engines.engine import Engine, Hyper, Wrapped
from flcompress.training.engines.replicated import Replica


class Shards(Replica):
    """A model whose parameters are DTensors; this process holds its part of each."""

    def _norm(self) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self._named.values(), self._hyper.max_grad_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def shards(self) -> dict[str, torch.Tensor]:
        return {name: _local(parameter) for name, parameter in self._named.items()}

    def written(self) -> None:
        self.model.reshard()  # a forward without backward leaves what lies outside the blocks gathered

    def gathered(self) -> dict[str, torch.Tensor]:
        whole: dict[str, torch.Tensor] = {}
        for name, value in self.model.state_dict().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if self.work.world.main:
                whole[name] = full.detach().cpu().clone()
        return whole

    def state(self) -> dict[str, torch.Tensor]:
        flat = {f"model.{name}": _local(value) for name, value in self.model.state_dict().items()}
        return flat | {key: _local(value) for key, value in self._moments(self._named).items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            _local(value).copy_(state[f"model.{name}"])
        self._restore_moments(state)

    def _placed(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        return DTensor.from_local(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class FullySharded(Engine):
    """FSDP2 over all processes."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.splits_weights = True
        self.layout = f"fsdp2 on {work.world.size} processes"
        # A transformer's last reshape makes a view; nothing here writes into what a model returned.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        self._mesh = init_device_mesh(torch.device(work.device).type, (work.world.size,))

    def trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> Wrapped:
        self._share(model, _blocks(model))
        return self.proven(Shards(self.work, model, model, hyper), FSDPModule)

    def frozen(self, model: nn.Module) -> Any:
        self._share(model, _blocks(model))
        return model

    def _share(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        for block in blocks:
            fully_shard(block, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)
        loose = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if loose:  # fully_shard is silent where it does nothing
            raise RequestError(f"training.engine: fsdp2 left {loose[0]} of {type(model).__name__} unshared; use ddp")


def _blocks(model: Any) -> list[nn.Module]:
    if not hasattr(model, "config"):  # a LoRA, split as one
        return []
    settings = json.dumps(dict(model.config), sort_keys=True, default=str)
    return [model.get_submodule(path) for path in _block_paths(cast(Hashable, type(model)), settings)]


@lru_cache
def _block_paths(kind: Any, settings: str) -> tuple[str, ...]:
    """Traced once for all roles of one architecture."""
    with torch.device("meta"):
        plain = kind.from_config(json.loads(settings))
    return tuple(block.path for block in graph_of(plain).blocks)


def _local(value: torch.Tensor) -> torch.Tensor:
    part: torch.Tensor = value.to_local() if isinstance(value, DTensor) else value
    return part.detach()
