"""DMD2's adversarial term: small heads on a frozen teacher's features tell real clips from the generator's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from flcompress.diffusion.network import Conditioning, Network
from flcompress.distributed.sequence import SequenceGroup
from flcompress.draws import seed_of
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of
from flcompress.models.network import stock_model, stock_name
from flcompress.training.distillation.settings import DistillationSettings
from flcompress.training.engines import Engine
from flcompress.training.role import TrainedRole

WIDTH = 64
"""Channels inside a head."""
NEAR = 0.01
"""Deviation of the noise at which the approximated R1 penalty takes its finite difference."""
RAMP = 0.1
"""Share of the generator's updates in which the term's weight rises from 0."""

Grids = list[torch.Tensor]
"""Features of one batch of clips, one tensor [n, channels, frames, height, width] for each head."""


class TeacherFeatures:
    """Token grids of a frozen transformer's blocks at half, at three quarters and at the end of its depth.

    Args:
        model: the stock transformer inside of `network`.
        network: the same model under its engine, as a network.
        graph: the model's.
        sequence: the processes that compute its forwards together, if there are several.

    Attributes:
        channels: width of the tokens, one for each of the blocks.
    """

    def __init__(self, model: Any, network: Network, graph: BlockGraph, sequence: SequenceGroup | None = None) -> None:
        self._network, self._config, self._sequence = network, stock_model(model).config, sequence
        self._family = family_of(stock_name(stock_model(model)))
        streams = graph.clip_streams()
        depths = (len(streams) // 2, 3 * len(streams) // 4, len(streams) - 1)
        chosen = dict(list(streams.items())[depth] for depth in depths)
        self.channels = [stream.spec.shape[-1] for stream in chosen.values()]
        self._kept: Grids | None = None
        for path, stream in chosen.items():
            model.get_submodule(path).register_forward_hook(self._hook(stream.output))

    def _hook(self, index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._kept is not None:
                self._kept.append(output[index] if isinstance(output, tuple) else output)

        return keep

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, Grids]:
        """Return (the teacher's prediction, detached, and the features) of noised latents, from one forward.

        The features carry a gradient where x requires one.
        """
        grid = self._family.token_grid(self._config, (x.shape[2], x.shape[3], x.shape[4]))
        tokens = self._kept = []
        with torch.set_grad_enabled(x.requires_grad):
            try:
                prediction = self._network(x, timestep, conditioning)
            finally:
                self._kept = None  # other forwards, and blocks that a backward recomputes, are not the discriminator's
            if self._sequence is not None:
                tokens = [self._sequence.gather(part, 1, math.prod(grid)) for part in tokens]
            return prediction.detach(), [part.transpose(1, 2).reshape(len(x), -1, *grid) for part in tokens]


class Heads(nn.Module):
    """A head of 3D convolutions over the token grid of each feature; text tokens are not in it.

    Args:
        channels: width of each feature.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(width, WIDTH, 1),
                nn.SiLU(),
                nn.Conv3d(WIDTH, WIDTH, 3, padding=1),
                nn.GroupNorm(8, WIDTH),
                nn.SiLU(),
                nn.Conv3d(WIDTH, 1, 3, padding=1),
            )
            for width in channels
        )

    @override
    def forward(self, *batches: Grids) -> list[torch.Tensor]:
        """Return the logits [n, heads], positive for real clips, of each batch, in fp32.

        Tokens grow with depth by orders of magnitude, so each is normalised.
        """
        with torch.autocast(batches[0][0].device.type, enabled=False):
            return [
                torch.stack([self._logits(head, x) for head, x in zip(self.heads, grids, strict=True)], dim=1)
                for grids in batches
            ]

    def _logits(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        tokens = F.rms_norm(x.float().movedim(1, -1), x.shape[1:2]).movedim(-1, 1)
        logits: torch.Tensor = head(tokens).flatten(1).mean(dim=1)
        return logits


def head_parameters(width: float) -> float:
    """Return the parameters of `Heads` on a transformer of a width and three features, for the plan."""
    return 3.0 * (WIDTH * width + 27.0 * WIDTH * (WIDTH + 1) + 4.0 * WIDTH + 1.0)


class Adversary:
    """The discriminator in training (Yin et al. 2024, DMD2, section 4.3, with a frozen teacher's features).

        L_D = softplus(-D(x)) + softplus(D(x_g)) + r1 (D(x) - D(x + 0.01 e))^2,    L_G = weight softplus(-D(x_g))

    means over clips and heads. The last term of L_D is the R1 penalty by a finite difference (Lin et al. 2025, APT).
    The teacher is not trained, so the heads are an ordinary trained model to every engine.

    Args:
        engine: trains the heads.
        settings: the distillation's.
        features: of the teacher.

    Attributes:
        role: the heads as a trained role.
    """

    def __init__(self, engine: Engine, settings: DistillationSettings, features: TeacherFeatures) -> None:
        self._features, self._settings = features, settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(engine.context.seed, "discriminator"))
            heads = Heads(features.channels).to(engine.context.device)
        self.role = TrainedRole.of(
            engine,
            "discriminator",
            heads,
            settings.optimisation,
            learning_rate=settings.critic_learning_rate,
            ema_decay=0.0,
            updates=settings.critic_updates,
        )
        self._grids: Grids = []

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the teacher's prediction, and keep the features for `generator_loss`."""
        prediction, self._grids = self._features(x, timestep, conditioning)
        return prediction

    def generator_loss(self, noised: torch.Tensor, met: torch.Tensor, update: int) -> torch.Tensor:
        """Return what the generator minimises in one of its updates.

        The gradient is taken here, down to the sample: it reaches no parameter of the heads, and the teacher's
        activations are free before the generator's backward.

        Args:
            noised: the generator's noised sample, with its graph.
            met: the same without it, which requires a gradient and of which `predict` has kept the features.
            update: the generator's, from 0.
        """
        grids, self._grids = self._grids, []
        with torch.enable_grad():
            (logits,) = self.role.model(grids)
            loss = F.softplus(-logits).mean()
        (gradient,) = torch.autograd.grad(loss, met)
        weight = self._settings.gan_weight * min(1.0, update / (RAMP * self._settings.optimisation.steps))
        return weight * (loss.detach() + ((noised - noised.detach()) * gradient).sum())

    @torch.no_grad()
    def features(self, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> Grids:
        """Return the features of a noised batch, without a gradient."""
        return self._features(x, timestep, conditioning)[1]

    def critic_loss(
        self, generated: Grids, real: Grids, near: Grids | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return (what the heads minimise, mean logits to log).

        Args:
            generated: features of the generator's samples.
            real: features of real clips, noised by the same law.
            near: the same of these with a little more noise; None without the penalty.
        """
        fake_logits, real_logits, *others = self.role.module(generated, real, *([near] if near else []))
        loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
        for logits in others:
            loss = loss + self._settings.gan_r1 * (logits - real_logits).square().mean()
        means = {"real_logit": real_logits.detach().mean(), "generated_logit": fake_logits.detach().mean()}
        return loss, means | {"logit_gap": means["real_logit"] - means["generated_logit"]}
