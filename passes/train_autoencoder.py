"""Train the video autoencoder of a pipeline from clips (used for the embedded benchmark's teacher)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from flcompress.data import moving_digits
from flcompress.draws import generator
from flcompress.training.loop import Progress, train
from flcompress.training.trained import Trained, warmup_cosine

LATENT_PENALTY = 1e-4
"""Weight of the mean square of the latents: keeps their scale near one; the pictures hardly feel it."""

LATENT_NOISE = 0.05
"""Standard deviation of the noise put on the latents, so that the decoder forgives small errors of a denoiser.

The posterior's own noise starts at one, drowns the signal, and training then settles on an empty picture.
"""

LATENT_STATISTICS_CLIPS = 512


def fit(
    vae: Any, clips: Callable[[torch.Generator], torch.Tensor], *, steps: int, learning_rate: float, seed: int,
    directory: Path, progress: Progress,
) -> None:
    """Minimise the reconstruction error of clips [n, 3, frames, height, width] in [-1, 1]."""
    role = Trained(
        "autoencoder", vae.train(), learning_rate=learning_rate, schedule=warmup_cosine(steps, min(100, steps))
    )

    def train_step(step: int, draw: torch.Generator) -> Mapping[str, float]:
        x = clips(draw)
        latents = vae.encode(x).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=draw)
        error = _decode_unclamped(vae, latents + LATENT_NOISE * noise) - x
        loss = error.square().mean() + error.abs().mean() + LATENT_PENALTY * latents.square().mean()
        return role.update(loss)

    train(train_step, [role], steps=steps, seed=(seed, "train-autoencoder"), directory=directory, progress=progress)
    vae.eval()


def _decode_unclamped(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode, before `AutoencoderKLWan.decode` clamps to [-1, 1].

    A clamped picture has no gradient where it overshoots; on a black ground every pixel soon does and training is dead.
    The decoder runs once per latent frame; its outputs, joined over time, are the clip.
    """
    parts: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda module, given, output: parts.append(output))
    try:
        vae.decode(latents)
    finally:
        handle.remove()
    return torch.cat(parts, dim=2)


@torch.no_grad()
def latent_statistics(vae: Any, seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel over training clips, as Wan stores them."""
    clips, _ = moving_digits.sample(LATENT_STATISTICS_CLIPS, "train", generator(seed, "latent-statistics"))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in clips.split(64)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()
