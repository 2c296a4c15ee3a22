"""Flow matching: noising, the velocity target, and Tweedie's formula.

x_s = (1 - s) x0 + s e with s in [0, 1]; the network predicts v = e - x0 (docs/method.md, "Conventions"). `sigma` is s,
one value a sample, shape [n]; latents are [n, channels, frames, height, width] or any shape that starts with n.
"""

from __future__ import annotations

import torch


def spread(sigma: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Sigma [n] shaped to multiply a tensor of `like`'s rank."""
    return sigma.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x_s = (1 - s) x0 + s e."""
    s = spread(sigma, x0)
    return (1.0 - s) * x0 + s * noise


def velocity(x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The training target v = e - x0."""
    return noise - x0


def tweedie(x: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The posterior mean E[x0 | x_s] = x_s - s v (Efron 2011, "Tweedie's formula and selection bias")."""
    return x - spread(sigma, x) * v


def shift(sigma: torch.Tensor, by: float) -> torch.Tensor:
    """Timestep shift k: s -> k s / (1 + (k - 1) s) (Esser et al. 2024, eq. 23)."""
    return by * sigma / (1.0 + (by - 1.0) * sigma)


def elbo_weight(sigma: torch.Tensor) -> torch.Tensor:
    """The continuous-time ELBO weight on |x0 - x0_hat|^2: -1/2 dSNR/ds = (1 - s) / s^3, for SNR = ((1 - s) / s)^2.

    Diverges at 0: clamp sigma before (Kingma et al. 2021, eq. 17).
    """
    return (1.0 - sigma) / sigma**3
