"""The noising process of a model: what a noise level means, what its network predicts, and Tweedie's formula.

A level lies in (0, 1], 1 being pure noise, one value a sample, shape [n]; latents are any shape that starts with n.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from flcompress.diffusion import flow
from flcompress.diffusion.flow import spread

NUM_TRAIN_TIMESTEPS = 1000


class Process(ABC):
    """x = a(level) x0 + b(level) e, and how a network's output is read."""

    @abstractmethod
    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Noised latents."""

    @abstractmethod
    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """What a network that knew x0 and the noise would predict: the training target."""

    @abstractmethod
    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """The posterior mean E[x0 | x] (Efron 2011, "Tweedie's formula and selection bias")."""

    @abstractmethod
    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        """One deterministic step (Euler, DDIM) to the level `following`, which may be 0."""

    @abstractmethod
    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        """The continuous-time ELBO weight on |x0 - x0_hat|^2: -1/2 dSNR/dlevel (Kingma et al. 2021, eq. 17)."""

    @abstractmethod
    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """What the network is told, fp32 [n]."""


class Flow(Process):
    """Flow matching: x = (1 - s) x0 + s e; the network predicts the velocity e - x0."""

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return flow.add_noise(x0, noise, level)

    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return flow.velocity(x0, noise)

    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return flow.tweedie(x, prediction, level)

    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        return x + spread(following - level, x) * prediction

    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        return flow.elbo_weight(level)

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return level * NUM_TRAIN_TIMESTEPS


class Discrete(Process):
    """DDPM and its kin (CogVideoX): x_t = a_t x0 + b_t e at integer timesteps; level = (t + 1) / T, and 0 is clean.

    Args:
        alphas_cumprod: a_t^2, [T], as the stock scheduler has them.
        prediction: "epsilon" (the noise) or "v_prediction" (a e - b x0; Salimans & Ho 2022).
    """

    def __init__(self, alphas_cumprod: torch.Tensor, prediction: str) -> None:
        self._signal = torch.cat([torch.ones(1), alphas_cumprod.float().cpu()])  # entry 0 is the clean end
        self._velocity = prediction == "v_prediction"

    def _index(self, level: torch.Tensor) -> torch.Tensor:
        last = len(self._signal) - 1
        return (level.cpu() * last).round().long().clamp(0, last)

    def _coefficients(self, level: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        signal = self._signal[self._index(level)].to(like.device)
        return spread(signal.sqrt(), like), spread((1.0 - signal).sqrt(), like)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x0)
        return a * x0 + b * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x0)
        return a * noise - b * x0 if self._velocity else noise

    def tweedie(self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        a, b = self._coefficients(level, x)
        return a * x - b * prediction if self._velocity else (x - b * prediction) / a

    def step(
        self, x: torch.Tensor, prediction: torch.Tensor, level: torch.Tensor, following: torch.Tensor
    ) -> torch.Tensor:
        a, b = self._coefficients(level, x)
        noise = a * prediction + b * x if self._velocity else prediction
        return self.add_noise(self.tweedie(x, prediction, level), noise, following)

    def elbo_weight(self, level: torch.Tensor) -> torch.Tensor:
        # A finite difference; at the first index, where the ratio before is infinite, the one after it serves.
        index = self._index(level).clamp(min=2)
        ratio = self._signal / (1.0 - self._signal)
        steps = len(self._signal) - 1
        return (0.5 * steps * (ratio[index - 1] - ratio[index])).to(level.device)

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        return (self._index(level) - 1).float().to(level.device)


FLOW = Flow()
