"""A model in training: its updates, its learning rate, its moving average, and the guard before every step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.draws import Draws
from flcompress.errors import TrainingError
from flcompress.training.engines import Engine, Hyper, NotFinite
from flcompress.training.engines.offload import average, to_host
from flcompress.training.parts import Part, StoredParts


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of a micro batch, where an objective hands over more than its value.

    Attributes:
        value: scalar, the mean over the micro batch's samples.
        figures: name -> scalar mean over the same samples, to be logged.
        per_sample: name -> one value for each of them [n], logged as name_mean, name_min and name_max of the batch.
        backward_context: entered around the backward, which recomputes blocks under gradient checkpointing.
    """

    value: torch.Tensor
    figures: Mapping[str, torch.Tensor] = field(default_factory=dict)
    per_sample: Mapping[str, torch.Tensor] = field(default_factory=dict)
    backward_context: AbstractContextManager[None] = field(default_factory=nullcontext)


class TrainedRole:
    """A trained role (a generator, a critic, ...) with AdamW, gradient clipping and an optional moving average.

    An objective hands over its loss; micro batches, the backward, the step and the figures are the role's:

        figures = role.update(draws, loss_of)

    Args:
        engine: what shares it over the processes.
        name: the role, used in logs and checkpoints.
        model: the module whose parameters with `requires_grad` are trained.
        batch: samples of a step, over all processes.
        hyper: hyperparameters of the optimiser.
        ema_decay: decay of the moving average, or None for none. It starts from the model as passed here, so load
            weights first: an average that starts from other weights stays anchored to them.
        ema_start: update after which it begins; before, it is the weights themselves.
        schedule: update, from 0 -> factor on the learning rate; constant where None.

    Attributes:
        model: the module that was passed; paths of blocks lead into it.
        module: what is called, so that the engine sees every forward.
        updates: optimiser steps taken so far.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        model: Any,
        *,
        batch: int,
        hyper: Hyper,
        ema_decay: float | None = None,
        ema_start: int = 0,
        schedule: Callable[[int], float] | None = None,
    ) -> None:
        self.name = name
        self.ema_decay, self._ema_start = ema_decay, ema_start
        self._world, self._at_once = engine.context.world, engine.context.at_once(batch)
        self._learning_rate, self._schedule = hyper.learning_rate, schedule
        self._wrapped = engine.wrap_trained(model, hyper, batch=batch)
        self.model, self.module = self._wrapped.model, self._wrapped.module
        self.updates = 0
        self._loss: torch.Tensor | float = 0.0
        shards = self._wrapped.shards()
        self._averages_on_host = "moments" in engine.context.offload
        clone = to_host if self._averages_on_host else torch.clone
        self._ema = {name: clone(part.tensor) for name, part in shards.items()} if ema_decay is not None else None

    @classmethod
    def of(
        cls,
        engine: Engine,
        name: str,
        model: Any,
        settings: Optimisation,
        *,
        learning_rate: float | None = None,
        ema_decay: float | None = None,
        updates: int = 1,
    ) -> TrainedRole:
        """Return the role that a pass's arguments describe.

        Args:
            engine: see the class.
            name: see the class.
            model: see the class.
            settings: the pass.
            learning_rate: where it is not the pass's own.
            ema_decay: where it is not the pass's own; 0 for no average.
            updates: updates in each of the pass's steps.
        """
        decay = settings.ema_decay if ema_decay is None else ema_decay
        return cls(
            engine,
            name,
            model,
            batch=settings.batch,
            hyper=Hyper(
                learning_rate=settings.learning_rate if learning_rate is None else learning_rate,
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                max_grad_norm=settings.clip_grad_norm,
            ),
            ema_decay=decay or None,
            ema_start=settings.ema_start * updates,
            schedule=lambda update: settings.factor(update // updates),
        )

    def update(self, draws: Draws, loss_of: Callable[[Draws], torch.Tensor | Loss]) -> dict[str, float]:
        """Take one optimiser step on the loss of a batch; all processes together.

        Args:
            draws: this process's samples. They are drawn in micro batches of as many as the training allows at once;
                see `Draws.micro_batches`.
            loss_of: draws of a micro batch -> its loss, a scalar mean over its samples, or a `Loss`.

        Returns:
            What to log: the loss of the batch and the gradient norm, then the figures of the `Loss`.

        Raises:
            TrainingError: the loss or its gradient is not finite in some process; nothing was changed.
        """
        parts: list[tuple[Draws, Loss]] = []
        for part in draws.micro_batches(self._at_once):
            with self._wrapped.micro_batch(last=part.mine.stop == draws.mine.stop):
                result = loss_of(part)
                loss = result if isinstance(result, Loss) else Loss(value=result)
                with loss.backward_context:
                    self._backward(loss.value, part)
            parts.append((part, loss))
        value, figures, per_sample = self._read(parts, draws.batch)
        logged = {**self._step(value), **figures}
        for name, batch in per_sample.items():
            everyone = self._of_all(batch)
            logged[f"{name}_mean"] = float(everyone.mean())
            logged[f"{name}_min"] = float(everyone.min())
            logged[f"{name}_max"] = float(everyone.max())
        return logged

    def _read(
        self, parts: Sequence[tuple[Draws, Loss]], batch: int
    ) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
        """Return (loss, figures, per sample [batch]) of this process's micro batches; the host waits for the GPU once.

        Args:
            parts: the draws and the loss of each.
            batch: samples of the step, over all processes.
        """
        assert isinstance(self._loss, torch.Tensor)
        tensors = [tensor for _, loss in parts for tensor in (*loss.figures.values(), *loss.per_sample.values())]
        flat = torch.cat([tensor.detach().double().reshape(-1) for tensor in (self._loss, *tensors)]).cpu()
        loss_value, self._loss = float(flat[0]), 0.0
        rest = iter(torch.split(flat[1:], [tensor.numel() for tensor in tensors]))
        figures: dict[str, float] = defaultdict(float)
        per_sample: dict[str, torch.Tensor] = {}
        for part, loss in parts:
            for name in loss.figures:
                figures[name] += part.share * float(next(rest))
            for name in loss.per_sample:
                whole = per_sample.setdefault(name, torch.zeros(batch, dtype=torch.float64))
                whole[part.mine] = next(rest)
        return loss_value, figures, per_sample

    def _backward(self, loss: torch.Tensor, part: Draws) -> None:
        """Back-propagate the loss of a micro batch; gradients add up to those of the batch."""
        self._loss = self._loss + part.share * loss.detach()
        self._world.heartbeat()
        self._wrapped.backward(part.share * loss)
        self._world.heartbeat()

    def _step(self, loss: float) -> dict[str, float]:
        """Take the optimiser step after the last micro batch, whose loss over this process's samples is given."""
        value = self._world.all_mean({"loss": loss})["loss"]
        if not math.isfinite(value):
            self._wrapped.clear()
            raise self._not_finite("loss", value)
        factor = self._schedule(self.updates) if self._schedule is not None else 1.0
        try:
            norm = self._wrapped.step(self._learning_rate * factor)
        except NotFinite as error:
            raise self._not_finite("gradient norm", error.norm) from error
        self.updates += 1
        self._world.heartbeat()
        if self._ema is not None and self.ema_decay is not None:
            # A short run must not stay near its start: the decay warms up with the number of averaged updates.
            averaged = self.updates - self._ema_start
            decay = min(self.ema_decay, (1.0 + averaged) / (10.0 + averaged)) if averaged > 0 else 0.0
            live = [part.tensor for part in self._wrapped.shards().values()]
            if self._averages_on_host:
                average(list(self._ema.values()), live, 1.0 - decay)
            else:
                torch._foreach_lerp_(list(self._ema.values()), live, 1.0 - decay)
        return {f"{self.name}_loss": value, f"{self.name}_grad_norm": norm}

    def _of_all(self, values: torch.Tensor) -> torch.Tensor:
        """Return one number for each sample of the batch, in every process.

        Args:
            values: [batch], zero for the samples of other processes.
        """
        sums = self._world.all_mean({str(n): value * self._world.data_size for n, value in enumerate(values.tolist())})
        return torch.tensor(list(sums.values()))

    def clear(self) -> None:
        """Discard gradients that another role's loss left here."""
        self._wrapped.clear()

    @contextmanager
    def with_average(self) -> Iterator[None]:
        """Give the model its moving average as weights while active, if there is one."""
        if self._ema is None:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._ema is not None
        for name, part in self._wrapped.shards().items():
            trained = part.tensor.clone()
            part.tensor.copy_(self._ema[name])
            self._ema[name].copy_(trained)
        self._wrapped.shards_changed()

    def full_state(self) -> dict[str, torch.Tensor]:
        """Return the whole state dict in the main process, empty in the others; all processes together."""
        self._world.heartbeat(f"gathering the weights of {self.name}")
        return self._wrapped.full_state()

    def averaged_state(self) -> dict[str, torch.Tensor]:
        """Return the whole state dict with the moving average in place of the trained parameters."""
        with self.with_average():
            return self.full_state()

    def parts(self) -> dict[str, Part]:
        """Return what this process holds of all that resuming bit for bit takes: weights, moments, average, counter."""
        parts = self._wrapped.parts()
        if self._ema is not None:
            parts |= {
                f"ema.{name}": replace(part, tensor=self._ema[name]) for name, part in self._wrapped.shards().items()
            }
        parts["updates"] = Part(torch.tensor(self.updates))
        return {f"{self.name}/{name}": part for name, part in parts.items()}

    def restore(self, stored: StoredParts) -> None:
        """Load what a checkpoint holds of `parts`, by whichever processes it was written."""
        self.updates = stored.number(f"{self.name}/updates")
        if self.updates:
            self._wrapped.begin_moments()
        for name, part in self.parts().items():
            stored.fill(name, part)
        self._wrapped.parts_changed()

    def _not_finite(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"{self.name}: the {what} is {value} at update {self.updates + 1}; expected a finite number. "
            "Stopped before the optimiser step; the last good checkpoint is kept. Lower learning_rate."
        )
