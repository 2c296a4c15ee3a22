"""Train the video autoencoder of a pipeline on moving digits (used for the embedded benchmark's teacher)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.optimisation import Optimisation, Schedule, Warmup
from flcompress.core.program import Program
from flcompress.core.steps import Cost, Pass, PassContext

if TYPE_CHECKING:
    from flcompress.training.methods.autoencoder import AutoencoderTraining


class TrainAutoencoder(Optimisation, Pass):
    """Train the autoencoder on moving-digits clips, which it draws itself, and measure its latents' scale.

    A recipe whose `data:` is anything but moving-digits is refused.

    `- train-autoencoder: {steps: 1500}`
    """

    name: ClassVar[str] = "train-autoencoder"
    version: ClassVar[int] = 2
    own_clips: ClassVar[str | None] = "moving-digits"
    added: ClassVar[tuple[str, ...]] = (*Optimisation.added, "ema_decay")

    batch: int = Field(8, gt=0, description="clips per step")
    learning_rate: float = Field(3e-3, gt=0, description="learning rate after the warm-up")
    schedule: Schedule = "cosine"
    warmup: Warmup = 100

    @override
    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(steps=self.steps, batch=self.batch)

    @property
    def training(self) -> AutoencoderTraining:
        """The training with these arguments."""
        from flcompress.training.methods.autoencoder import AutoencoderTraining

        return AutoencoderTraining(name=self.name, optimisation=self)

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.core.records import RESULT_FILE, StepsResult
        from flcompress.draws import generator
        from flcompress.models.loading import load_vae
        from flcompress.models.video import decode_latents, encode_clips
        from flcompress.moving_digits import digits
        from flcompress.training.methods.autoencoder import latent_statistics

        vae = load_vae(program.components["vae"], context.device).requires_grad_(True)
        self.training.fit(vae, context)
        vae.to("cpu")
        mean, std = latent_statistics(vae, context.seed)
        # A folder of this machine is no part of what is exported.
        vae.register_to_config(latents_mean=mean, latents_std=std, _name_or_path="")
        target = context.directory / "vae"
        vae.save_pretrained(str(target))
        clips, _ = digits.sample(64, "heldout", generator(context.seed, self.name, "heldout"))
        error = float((decode_latents(vae, encode_clips(vae, clips)) - clips).square().mean())
        record = {"steps": self.steps, "heldout_mean_square_error": error}
        StepsResult(**record).write(context.directory / RESULT_FILE)
        return program.with_component("vae", target)
