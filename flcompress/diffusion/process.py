"""The noising process of a model: what a noise level means, what its network predicts, and Tweedie's formula.

A level is in (0, 1], 1 being pure noise, one value per sample, shape [n]; latents have any shape that starts with n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from typing_extensions import override

from flcompress.diffusion.schedulers import NUM_TRAIN_TIMESTEPS

SIGMA_DATA = 0.5
"""d of the boundary condition of consistency models (Song et al. 2023, appendix C)."""
TIMESTEP_SCALING = 10.0
"""What LCM multiplies an integer timestep by in it (Luo et al. 2023)."""


def expand_to(level: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape a level [n] so that it multiplies a tensor of `like`'s rank."""
    return level.reshape(-1, *([1] * (like.ndim - 1)))


def shift(level: torch.Tensor, by: float) -> torch.Tensor:
    """Shift a flow's levels by k: s -> k s / (1 + (k - 1) s) (Esser et al. 2024, eq. 23)."""
    return by * level / (1.0 + (by - 1.0) * level)


class Process(ABC):
    """x = a(level) x0 + b(level) e, and how a network's output is read."""

    @abstractmethod
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return noised latents."""

    @abstractmethod
    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return what a network that knew x0 and the noise would predict: the training target."""

    @abstractmethod
    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return the posterior mean E[x0 | x] (Efron 2011, "Tweedie's formula and selection bias")."""

    def consistency(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Return a consistency function f(x, level), for which f(x, 0) = x (Song et al. 2023, eq. 5).

        Tweedie's formula, where that holds of it already.
        """
        return self.tweedie(x, prediction, level)

    @abstractmethod
    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        """Take one deterministic step (Euler, DDIM) to the level `following`, which may be 0."""

    @abstractmethod
    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        """Return the continuous-time ELBO weight on |x0 - x0_hat|^2: -1/2 dSNR/dlevel (Kingma et al. 2021, eq. 17)."""

    @abstractmethod
    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """Return the timestep that the network takes as input, fp32 [n]."""


class Flow(Process):
    """Flow matching (docs/method.md, "Conventions"): x_s = (1 - s) x0 + s e; the network predicts v = e - x0."""

    @override
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        s = expand_to(level, x0)
        return (1.0 - s) * x0 + s * noise

    @override
    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return noise - x0

    @override
    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return x - expand_to(level, x) * prediction

    @override
    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        return x + expand_to(following - level, x) * prediction

    @override
    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        # (1 - s) / s^3, for SNR = ((1 - s) / s)^2. It diverges at 0: callers clamp the level.
        return (1.0 - level) / level**3

    @override
    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level * NUM_TRAIN_TIMESTEPS


class Discrete(Process):
    """DDPM and variants (CogVideoX): x_t = a_t x0 + b_t e at integer timesteps; level = (t + 1) / T, and 0 is clean.

    Args:
        alphas_cumprod: a_t^2, [T], as the stock scheduler has them.
        prediction: "epsilon" (the noise) or "v_prediction" (a e - b x0; Salimans & Ho 2022).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: str) -> None:
        signal = torch.cat([torch.ones(1), alphas_cumprod.float().cpu()])  # entry 0 is the clean end
        self._signals = {signal.device: signal}
        self._velocity = prediction == "v_prediction"

    def _signal(self, device: torch.device) -> torch.Tensor:
        """Return a_t^2, [T + 1]; on each device once, so that a step neither copies nor waits."""
        if device not in self._signals:
            self._signals[device] = self._signals[torch.device("cpu")].to(device)
        return self._signals[device]

    def _index(self, level: torch.Tensor) -> torch.Tensor:
        last = len(self._signal(level.device)) - 1
        return (level * last).round().long().clamp(0, last)

    def _coefficients(self, level: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = self._signal(level.device)[self._index(level)].to(like.device)
        return expand_to(signal.sqrt(), like), expand_to((1.0 - signal).sqrt(), like)

    @override
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x0)
        return a * x0 + b * noise

    @override
    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x0)
        return a * noise - b * x0 if self._velocity else noise

    @override
    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x)
        return a * x - b * prediction if self._velocity else (x - b * prediction) / a

    @override
    def consistency(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        # c_skip x + c_out x0_hat, with c_skip = d^2 / (t^2 + d^2) and c_out = t / sqrt(t^2 + d^2), t scaled.
        t = expand_to(TIMESTEP_SCALING * self.timestep(level).clamp(min=0.0), x)
        square = t.square() + SIGMA_DATA**2
        return SIGMA_DATA**2 / square * x + t / square.sqrt() * self.tweedie(x, prediction, level)

    @override
    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        a, b = self._coefficients(level, x)
        noise = a * prediction + b * x if self._velocity else prediction
        return self.add_noise(self.tweedie(x, prediction, level), noise, following)

    @override
    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        # A finite difference; at the first index, where the ratio before is infinite, the one after it serves.
        index, signal = self._index(level).clamp(min=2), self._signal(level.device)
        ratio = signal / (1.0 - signal)
        return 0.5 * (len(signal) - 1) * (ratio[index - 1] - ratio[index])

    @override
    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return (self._index(level) - 1).float()


FLOW = Flow()
