"""The engine on DeepSpeed's ZeRO: 1 splits the optimiser over the processes, 2 the gradients too, 3 the weights too."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from flcompress.core.steps import PassContext
from flcompress.errors import UnavailableError
from flcompress.models.loading import empty_transformer, put
from flcompress.training.engines.engine import Engine, Hyper, NotFinite, WrappedModel
from flcompress.training.engines.optimiser import begin_moments, optimiser
from flcompress.training.parts import Part


class ZeroModel(WrappedModel):
    """A model behind a DeepSpeed engine, which owns gradients, clipping and the step of torch's AdamW."""

    def __init__(self, context: PassContext, stage: int, model: Any, hyper: Hyper, config: Mapping[str, Any]) -> None:
        import deepspeed

        self.context, self.model, self._stage = context, model, stage
        self._named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._optimizer = optimiser(list(self._named.values()), hyper)
        self.module, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config={**config, "gradient_clipping": hyper.max_grad_norm, "zero_allow_untested_optimizer": True},
        )
        self._zero = self.module.optimizer
        # DeepSpeed makes the moments with a step on zero gradients, which AdamW's bias correction would count.
        self._optimizer.state.clear()

    @property
    def _partitions(self) -> list[torch.Tensor]:
        """This process's part of the fp32 weights, one flat tensor per parameter group."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Exchange gradients once a step under ZeRO-1, after every backward under 2 and 3, which keep a part."""
        self.module.set_gradient_accumulation_boundary(last)
        yield

    @override
    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss)

    @override
    def step(self, learning_rate: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        # DeepSpeed silently skips the step where a gradient is not finite.
        if self._zero.overflow:
            raise NotFinite(float("nan"))
        return float(self.module.get_global_grad_norm())

    @override
    def clear(self) -> None:
        self.module.zero_grad()

    @override
    def shards(self) -> dict[str, Part]:
        if self._stage < 3:
            return {name: Part(parameter.detach()) for name, parameter in self._named.items()}
        return {name: self._own_range(parameter, parameter.ds_tensor.data) for name, parameter in self._named.items()}

    def _own_range(self, parameter: Any, padded: torch.Tensor) -> Part:
        """Return the part of ZeRO-3's parameter: every process has as many numbers, the last ones padding."""
        total = parameter.ds_numel
        first = min(self.context.world.rank * padded.numel(), total)
        return Part(padded.view(-1)[: total - first], first, total)

    @override
    def full_state(self) -> dict[str, torch.Tensor]:
        import deepspeed

        if self._stage < 3:
            state = self.model.state_dict() if self.context.world.main else {}
            return {name: value.detach().cpu().clone() for name, value in state.items()}
        gathered: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
                if self.context.world.main:
                    gathered[name] = parameter.detach().cpu().clone()
        buffers = set(self.model.state_dict()) - set(dict(self.model.named_parameters()))
        if self.context.world.main:
            gathered |= {name: self.model.get_buffer(name).detach().cpu().clone() for name in buffers}
        return gathered

    @override
    def parts(self) -> dict[str, Part]:
        # Buffers: everything that is trained is in the partitions.
        buffers = set(self.model.state_dict()) - set(dict(self.model.named_parameters()))
        parts = {f"model.{name}": Part(self.model.get_buffer(name).detach()) for name in sorted(buffers)}
        for name, parameter in self._named.items():
            for kind, partition in self._flat_tensors(self._group_of(parameter)).items():
                if kind == "optimizer.step":  # one for all parameters of a group
                    parts[f"{kind}.{name}"] = Part(partition)
                elif (part := self._part(parameter, partition)) is not None:
                    parts[f"{kind}.{name}"] = part
        return parts

    def _flat_tensors(self, group: int) -> dict[str, torch.Tensor]:
        """Return the weights and the moments of a group."""
        partition = self._partitions[group]
        moments = self._optimizer.state.get(partition, {})
        return {"model": partition.detach(), **{f"optimizer.{moment}": value for moment, value in moments.items()}}

    def _group_of(self, parameter: Any) -> int:
        # The optimiser has one group, which ZeRO-3 splits.
        return int(self._zero.grad_position[parameter.ds_id][0]) if self._stage == 3 else 0

    def _part(self, parameter: Any, flat: torch.Tensor) -> Part | None:
        """Return what a group's flat tensor has of a parameter; None if that is nothing."""
        if self._stage == 3:
            _, start, count = self._zero.grad_position[parameter.ds_id]
            return self._own_range(parameter, flat[start : start + count])
        place = parameter._hp_mapping
        if place is None:
            return None
        here = place.hp_fragment_address
        return Part(flat[here.start : here.start + here.numel], place.lp_fragment_address.start, parameter.numel())

    @override
    def begin_moments(self) -> None:
        for partition in self._partitions:
            begin_moments(self._optimizer, partition)

    @override
    def parts_changed(self) -> None:
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for partition, flat in zip(self._partitions, self._zero.fp16_partitioned_groups_flat, strict=True):
            flat.data.copy_(partition.data)


class Zero(Engine):
    """DeepSpeed on all processes."""

    def __init__(self, context: PassContext, stage: int) -> None:
        super().__init__(context)
        try:
            import deepspeed
        except ImportError as error:
            raise UnavailableError(
                f"training.engine: zero{stage} needs DeepSpeed; pip install 'flcompress[deepspeed]', or use fsdp2"
            ) from error
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", message=".*is deprecated", module="torch.distributed")
        # Under its bf16 norms keep their fp32 weights, which torch has no fused kernel for.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        if context.device == "cpu":
            # Otherwise a shared-memory operation is compiled on first use, for minutes.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")  # one process without a launcher, where training.processes is 1
        deepspeed.init_distributed(dist_init_required=False)
        self._stage, self._kind = stage, deepspeed.DeepSpeedEngine
        # ZeRO-3 would give a skipped block the gradient of its last step.
        self.skips = stage < 3
        self.splits_weights = stage == 3

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, unsharded: Collection[str] = ()) -> Any:
        if self._stage < 3:
            return super()._load(folder, dtype, trained=trained)
        import deepspeed

        # Not inside `zero.Init`, which would round what buffers are computed from to one dtype.
        model, stored = empty_transformer(folder, self.context.device, dtype)
        model.requires_grad_(trained)
        # Split here, block by block: `deepspeed.initialize` would need all weights whole at once.
        for part in (*(block.path for block in self.graph(folder).blocks), ""):
            for name, parameter in list(model.get_submodule(part).named_parameters(part)):
                if parameter.device.type == "meta":
                    weight = torch.empty_like(parameter, device=self.context.device, requires_grad=False)
                    stored[name].fill(weight)
                    put(model, name, weight)
            deepspeed.zero.Init(
                module=model.get_submodule(part), config_dict_or_path=self._config(self.context.world.data_size)
            )
        for name, _ in model.named_buffers():
            if name in stored:
                stored[name].fill(model.get_buffer(name))
        return model

    @override
    def wrap_trained(self, model: nn.Module, hyper: Hyper, *, batch: int) -> WrappedModel:
        wrapped = ZeroModel(self.context, self._stage, model, hyper, self._config(batch))
        stage, processes = wrapped.module.zero_optimization_stage(), wrapped.module.dp_world_size
        if (stage, processes) != (self._stage, self.context.world.size):
            raise self._mismatch(
                f"DeepSpeed runs ZeRO-{stage} on {processes}", f"ZeRO-{self._stage} on {self.context.world.size}"
            )
        return self.verify_engine(wrapped, self._kind)

    @override
    def wrap_frozen(self, model: nn.Module) -> Any:
        if self._stage < 3:
            return model
        import deepspeed

        return deepspeed.initialize(model=model, config=self._config(self.context.world.data_size, frozen=True))[0]

    def _config(self, batch: int, *, frozen: bool = False) -> dict[str, Any]:
        half = self.context.precision == "bf16" and not frozen
        return {
            "train_micro_batch_size_per_gpu": batch // self.context.world.data_size,
            "gradient_accumulation_steps": 1,  # it would divide the loss; see `micro_batch`
            "steps_per_print": 1 << 62,
            # Small parameters are split like all others, so that a process holds its share of everything.
            "zero_optimization": {"stage": self._stage, "stage3_param_persistence_threshold": 0},
            # Weights and what the processes exchange stay in fp32.
            "torch_autocast": {"enabled": half, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }

    @contextmanager
    @override
    def forward_mode(self) -> Iterator[None]:
        # DeepSpeed sets the precision of its own forwards. Inside another autocast its bf16 copies of the weights would
        # outlive their update.
        yield
