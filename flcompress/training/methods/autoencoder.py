"""Train a video autoencoder to reconstruct moving-digits clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from flcompress.core.optimisation import Optimisation
from flcompress.core.steps import PassContext
from flcompress.draws import Draws, generator
from flcompress.moving_digits import digits
from flcompress.training.engines import engine_of
from flcompress.training.loop import train
from flcompress.training.role import TrainedRole

LATENT_PENALTY = 1e-4
"""Weight of the mean square of the latents: keeps their scale near one and hardly changes the pictures."""

LATENT_NOISE = 0.05
"""Standard deviation of the noise added to the latents, so that the decoder tolerates small errors of a denoiser.

The posterior's own noise starts at one, drowns the signal, and training then settles on an empty picture.
"""

LATENT_STATISTICS_CLIPS = 512


@dataclass(frozen=True, kw_only=True)
class AutoencoderTraining:
    """The training of the `train-autoencoder` pass; the attributes are the pass's arguments."""

    name: str
    optimisation: Optimisation

    def fit(self, vae: Any, context: PassContext) -> None:
        """Minimise the reconstruction error of freshly drawn clips; `vae` is trained in place."""
        engine = engine_of(context)
        steps, batch = self.optimisation.steps, self.optimisation.batch
        role = TrainedRole.of(engine, "autoencoder", vae.train(), self.optimisation)

        def loss(draws: Draws) -> torch.Tensor:
            x = digits.sample(batch, "train", draws.shared)[0][draws.mine].to(context.device)
            latents: torch.Tensor = vae.encode(x).latent_dist.mode()
            noise = draws.normal(*latents.shape[1:]).to(context.device)
            error = _decode_unclamped(vae, latents + LATENT_NOISE * noise) - x
            return error.square().mean() + error.abs().mean() + LATENT_PENALTY * latents.square().mean()

        train(
            lambda step, draws: role.update(draws, loss),
            [role],
            engine=engine,
            name=self.name,
            steps=steps,
            batch=batch,
        )
        if self.optimisation.averages:
            vae.load_state_dict(role.averaged_state())
        vae.eval()


def _decode_unclamped(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Decode, before `AutoencoderKLWan.decode` clamps to [-1, 1].

    A clamped picture has no gradient where it overshoots; on a black ground every pixel soon does and training is dead.
    The decoder runs once per latent frame; its outputs, joined over time, are the clip.
    """
    parts: list[torch.Tensor] = []
    handle = vae.decoder.register_forward_hook(lambda module, args, output: parts.append(output))
    try:
        vae.decode(latents)
    finally:
        handle.remove()
    return torch.cat(parts, dim=2)


@torch.no_grad()
def latent_statistics(vae: Any, seed: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel over training clips, as Wan stores them."""
    clips, _ = digits.sample(LATENT_STATISTICS_CLIPS, "train", generator(seed, "latent-statistics"))
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(clips, 64)])
    return latents.mean(dim=(0, 2, 3, 4)).tolist(), latents.std(dim=(0, 2, 3, 4)).tolist()
