"""Engines that keep whole models: one process, or several whose gradients torch's DistributedDataParallel averages."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from flcompress.core.steps import PassContext
from flcompress.training.checkpoint import WHOLE
from flcompress.training.engines.engine import Engine, Hyper, NotFinite, WrappedModel
from flcompress.training.engines.optimiser import optimiser

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Replica(WrappedModel):
    """A model with torch's AdamW; every process holds all of it."""

    def __init__(self, context: PassContext, model: Any, module: Any, hyper: Hyper) -> None:
        self.context, self.model, self.module, self._hyper = context, model, module, hyper
        self._named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = optimiser(list(self._named.values()), hyper)

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
    def shards(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self._named.items()}

    @override
    def full_state(self) -> dict[str, torch.Tensor]:
        if not self.context.world.main:
            return {}
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    @override
    def state(self) -> dict[str, torch.Tensor]:
        if not self.context.world.main:
            return {}
        flat = {f"model.{name}": value.detach() for name, value in self.model.state_dict().items()}
        return flat | self._moments(self._named)

    def _moments(self, named: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {
            f"optimizer.{moment}.{name}": torch.as_tensor(value)
            for name, parameter in named.items()
            for moment, value in self._optimizer.state.get(parameter, {}).items()
        }

    @override
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        prefix = "model."
        self.model.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
        self._restore_moments(state)

    def _restore_moments(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._named.items():
            stored = {moment: state[key] for moment in MOMENTS if (key := f"optimizer.{moment}.{name}") in state}
            if stored:
                # AdamW counts steps on the CPU, unless it is fused.
                counter = parameter.device if self._optimizer.defaults.get("fused") else torch.device("cpu")
                self._optimizer.state[parameter] = {
                    moment: value.to(counter) if moment == "step" else self._like_parameter(parameter, value)
                    for moment, value in stored.items()
                }

    def _like_parameter(self, parameter: Any, value: torch.Tensor) -> torch.Tensor:
        return value.to(parameter.device)


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

    layout = WHOLE

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        return self.verify_engine(Replica(self.context, model, model, hyper), nn.Module)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        return model


class Distributed(Engine):
    """torch's DistributedDataParallel."""

    layout = WHOLE

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        from torch.nn.parallel import DistributedDataParallel

        devices = [torch.cuda.current_device()] if self.context.device == "cuda" else None
        # A skipped block has no gradient; it is skipped in every process alike.
        module = DistributedDataParallel(
            model, device_ids=devices, find_unused_parameters=True, gradient_as_bucket_view=True
        )
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        return self.verify_engine(AveragedReplica(self.context, model, module, hyper), DistributedDataParallel)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        return model
