"""A model in training: its optimiser, its moving average, and the guard before every step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from flcompress.errors import TrainingError


class Trained:
    """One trained role (a generator, a critic, ...) with AdamW, gradient clipping and an optional moving average.

    Args:
        name: the role, used in logs and checkpoints.
        model: the module whose parameters with `requires_grad` are trained.
        learning_rate: peak learning rate.
        betas: AdamW's.
        max_grad_norm: gradients are scaled down to this global norm.
        ema_decay: decay of the moving average, or None for none. It starts from the model as given here, so load
            weights first: an average that starts from other weights stays anchored to them.
        schedule: step -> factor on the learning rate; constant where None.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        ema_decay: float | None = None,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.max_grad_norm = max_grad_norm
        self.ema_decay = ema_decay
        self._learning_rate = learning_rate
        self._schedule = schedule
        self._named = {key: p for key, p in model.named_parameters() if p.requires_grad}
        # `foreach` batches the many small tensors of a step; it changes no result.
        self._optimizer = torch.optim.AdamW(
            list(self._named.values()), lr=learning_rate, betas=betas, weight_decay=weight_decay, foreach=True
        )
        self.updates = 0
        self._ema = {k: p.detach().clone() for k, p in self._named.items()} if ema_decay is not None else None

    def update(self, loss: torch.Tensor) -> dict[str, float]:
        """Back-propagate and take one optimiser step.

        Raises:
            TrainingError: the loss or its gradient is not finite; nothing was changed.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"{self.name}: the loss is {value} at update {self.updates + 1}; expected a finite number. "
                "Stopped before the optimiser step; the last good checkpoint is kept. Lower learning_rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(self._named.values(), self.max_grad_norm))
        if not math.isfinite(norm):
            self._optimizer.zero_grad(set_to_none=True)
            raise TrainingError(
                f"{self.name}: the gradient norm is {norm} at update {self.updates + 1}; expected a finite number. "
                "Stopped before the optimiser step; the last good checkpoint is kept. Lower learning_rate."
            )
        if self._schedule is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate * self._schedule(self.updates)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self._ema is not None and self.ema_decay is not None:
            # A short run must not stay near its start: the decay warms up with the number of updates.
            decay = min(self.ema_decay, (1.0 + self.updates) / (10.0 + self.updates))
            torch._foreach_lerp_(list(self._ema.values()), [p.detach() for p in self._named.values()], 1.0 - decay)
        return {f"{self.name}_loss": value, f"{self.name}_grad_norm": norm}

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """The model's state dict with the moving average in place of the trained parameters, where there is one."""
        state = {key: value.detach().clone() for key, value in self.model.state_dict().items()}
        if self._ema is not None:
            state.update({key: value.clone() for key, value in self._ema.items()})
        return state

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """Everything needed to go on bit for bit: weights, optimiser moments, average, counters. Flat, tensors only."""
        flat = {f"model.{key}": value.detach() for key, value in self.model.state_dict().items()}
        for key, parameter in self._named.items():
            for moment, value in self._optimizer.state.get(parameter, {}).items():
                flat[f"optimizer.{moment}.{key}"] = torch.as_tensor(value)
        if self._ema is not None:
            flat.update({f"ema.{key}": value for key, value in self._ema.items()})
        flat["updates"] = torch.tensor(self.updates)
        return flat

    def restore(self, flat: dict[str, torch.Tensor]) -> None:
        """Take up what `checkpoint` gave."""
        prefix = "model."
        self.model.load_state_dict({k[len(prefix) :]: v for k, v in flat.items() if k.startswith(prefix)})
        for key, parameter in self._named.items():
            moments = {
                m: flat[f"optimizer.{m}.{key}"]
                for m in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{m}.{key}" in flat
            }
            if moments:
                self._optimizer.state[parameter] = {
                    m: v.to(parameter.device) if m != "step" else v for m, v in moments.items()
                }
        if self._ema is not None:
            for key, value in self._ema.items():
                value.copy_(flat[f"ema.{key}"])
        self.updates = int(flat["updates"])


def warmup_cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Linear rise over `warmup` updates, then half a cosine down to 2 % at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * done))

    return factor
