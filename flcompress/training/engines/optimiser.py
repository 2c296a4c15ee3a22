"""AdamW, with no more memory than its moments: fused on a GPU, tensor by tensor on a CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from flcompress.tracing.prefix import host_like
from flcompress.training.engines.engine import Hyper
from flcompress.training.engines.offload import settle
from flcompress.training.parts import local

SLICE = 1 << 24
"""Numbers that are stepped at once (64 MiB), the size of the one temporary tensor."""


def optimiser(parameters: Sequence[torch.Tensor], hyper: Hyper) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019), without the first moment where beta1 is 0."""
    if hyper.betas[0] == 0.0:
        return MomentumFreeAdamW(
            parameters, lr=hyper.learning_rate, beta2=hyper.betas[1], weight_decay=hyper.weight_decay
        )
    # Not `foreach`, the default on a GPU: it makes temporaries as large as the model. `fused` makes none either, in one
    # kernel instead of a dozen a tensor.
    fused = all(parameter.device.type == "cuda" for parameter in parameters)
    return torch.optim.AdamW(
        parameters,
        lr=hyper.learning_rate,
        betas=hyper.betas,
        weight_decay=hyper.weight_decay,
        foreach=False,
        fused=fused,
    )


def begin_moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Give a parameter the counter and the moments of zero that its first step begins with, unless it has some."""
    if optimizer.state.get(parameter):
        return
    # The counter is on the CPU, unless the step is fused.
    counter = parameter.device if optimizer.defaults.get("fused") else torch.device("cpu")
    moments = ("exp_avg_sq",) if isinstance(optimizer, MomentumFreeAdamW) else ("exp_avg", "exp_avg_sq")
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0, device=counter),
        **{moment: torch.zeros_like(parameter) for moment in moments},
    }


class MomentumFreeAdamW(torch.optim.Optimizer):
    """AdamW with beta1 = 0, whose first moment is the gradient and need not be kept.

        v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr decay) p - lr g / (sqrt(v / (1 - beta2^t)) + eps)

    One number a parameter instead of AdamW's two, and the same steps bit for bit.

    Args:
        parameters: fp32; tensors, or DTensors, of which each process steps its own part.
        lr: learning rate.
        beta2: decay of v.
        weight_decay: decay of the parameters.
        eps: added to the root.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], *, lr: float, beta2: float, weight_decay: float, eps: float = 1e-8
    ) -> None:
        super().__init__(parameters, {"lr": lr, "beta2": beta2, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            beta2, eps = group["beta2"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                begin_moments(self, parameter)
                state = self.state[parameter]
                state["step"] += 1
                correction = (1.0 - beta2 ** float(state["step"])) ** 0.5
                for p, g, v in _slices(parameter, parameter.grad, state["exp_avg_sq"]):
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])
                    v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
                    p.addcdiv_(g, v.sqrt().div_(correction).add_(eps), value=-group["lr"])


class MomentsOnHost:
    """An optimiser whose moments are in host memory: each parameter's come to its device for its step, and go back.

    Args:
        optimizer: AdamW, or `MomentumFreeAdamW`; it then steps one parameter at a time.

    Attributes:
        state: parameter -> its counter and, in host memory, this process's part of its moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.state: defaultdict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's."""
        return self._optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients."""
        self._optimizer.zero_grad(set_to_none)

    def begin_moments(self, parameter: torch.Tensor) -> None:
        """Allocate moments of zero in host memory, unless the parameter has some."""
        if not self.state[parameter]:
            begin_moments(self._optimizer, parameter)
            made = self._optimizer.state.pop(parameter)
            self.state[parameter] = {
                name: value if name == "step" else host_like(local(value)).zero_() for name, value in made.items()
            }

    @torch.no_grad()
    def step(self) -> None:
        """Step every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = group["params"]
            try:
                for parameter in parameters:
                    if parameter.grad is not None:
                        group["params"] = [parameter]
                        self._step(parameter)
            finally:
                group["params"] = parameters
        settle(self.param_groups[0]["params"][0])

    def _step(self, parameter: torch.Tensor) -> None:
        self.begin_moments(parameter)
        held = self.state[parameter]
        here = {name: value if name == "step" else torch.empty_like(parameter) for name, value in held.items()}
        moments = [name for name in held if name != "step"]
        for name in moments:
            local(here[name]).copy_(held[name], non_blocking=True)
        self._optimizer.state[parameter] = here
        self._optimizer.step()
        for name in moments:
            held[name].copy_(local(here[name]), non_blocking=True)  # on one stream: in order
        del self._optimizer.state[parameter]


def _slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Iterate over the same rows of tensors of one shape, about `SLICE` numbers at a time."""
    parts = [part if part.ndim else part.reshape(1) for part in map(local, tensors)]
    rows = max(1, SLICE // max(1, parts[0][:1].numel()))
    return zip(*(torch.split(part, rows) for part in parts), strict=True)
