"""Engines that keep whole models: one process, or several whose gradients torch's DistributedDataParallel averages."""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from flcompress.core.steps import PassContext
from flcompress.training.engines.engine import Engine, Hyper, NotFinite, WrappedModel
from flcompress.training.engines.optimiser import MomentsOnHost, begin_moments, optimiser
from flcompress.training.parts import Part


class Replica(WrappedModel):
    """A model with torch's AdamW; every process holds all of it."""

    def __init__(self, context: PassContext, model: Any, module: Any, hyper: Hyper) -> None:
        self.context, self.model, self.module, self._hyper = context, model, module, hyper
        self._named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer: torch.optim.Optimizer | MomentsOnHost = optimiser(list(self._named.values()), hyper)
        if "moments" in context.offload:
            self._optimizer = MomentsOnHost(self._optimizer)

    @override
    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    @override
    def step(self, learning_rate: float) -> float:
        for parameter in self._named.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = self._norm()
        if not math.isfinite(norm):
            self.clear()
            raise NotFinite(norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.clear()
        return norm

    def _norm(self) -> float:
        """Clip the gradients to the limit; return their global norm before."""
        return float(nn.utils.clip_grad_norm_(self._named.values(), self._hyper.max_grad_norm))

    @override
    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    @override
    def shards(self) -> dict[str, Part]:
        return {name: self._part(parameter, parameter) for name, parameter in self._named.items()}

    @override
    def full_state(self) -> dict[str, torch.Tensor]:
        if not self.context.world.main:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    @override
    def parts(self) -> dict[str, Part]:
        parts = {f"model.{name}": self._part(value, value) for name, value in self.model.state_dict().items()}
        for name, parameter in self._named.items():
            for moment, value in self._optimizer.state.get(parameter, {}).items():
                part = Part(value) if moment == "step" else self._part(parameter, value)
                parts[f"optimizer.{moment}.{name}"] = part
        return parts

    def _part(self, weight: torch.Tensor, value: torch.Tensor) -> Part:
        """Return this process's part of a weight, or of what is kept for each of its numbers."""
        return Part(value.detach())

    @override
    def begin_moments(self) -> None:
        for parameter in self._named.values():
            if isinstance(self._optimizer, MomentsOnHost):
                self._optimizer.begin_moments(parameter)
            else:
                begin_moments(self._optimizer, parameter)


class AveragedReplica(Replica):
    """A DDP replica."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients once a step, after the last micro batch.

        A forward without `torch.no_grad` whose output is then detached makes torch wait for a backward: the next one is
        synchronised regardless, and a resumed training sums in a different order than an unbroken one.
        """
        return nullcontext() if last else self.module.no_sync()


class Local(Engine):
    """The engine of a single process."""

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        return self.verify_engine(Replica(self.context, model, model, hyper), nn.Module)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        return model


class Distributed(Engine):
    """torch's DistributedDataParallel."""

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        from torch.nn.parallel import DistributedDataParallel

        devices = [torch.cuda.current_device()] if self.context.device == "cuda" else None
        # A skipped block has no gradient; it is skipped in every process alike. Where nothing is skipped, torch
        # without this search orders its buckets anew after the first step: three processes and more then sum in an
        # order that a resumed training does not begin with.
        module = DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return self.verify_engine(AveragedReplica(self.context, model, module, hyper), DistributedDataParallel)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        return model
