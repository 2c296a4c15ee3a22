"""Wan 2.1 (text or image to video) and Wan 2.2 TI2V-5B, whose first latent frame can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families import original_names
from flcompress.models.families.family import (
    Config,
    Family,
    LatentShape,
    leading_to,
    normal,
    picture_of,
    replaced,
)
from flcompress.models.families.original_names import OriginalNames
from flcompress.models.video import encode_clips


class Wan(Family):
    """Image to video comes in two forms: a condition beside the latents, or ("first_frame") clean first tokens."""

    name: ClassVar[str] = "Wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)
    original: ClassVar[OriginalNames] = original_names.WAN

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        rest = {name: given[name] for name in ("encoder_hidden_states", "encoder_hidden_states_image") if name in given}
        if "condition" in given:
            x = torch.cat([x, given["condition"].to(x.dtype)], dim=1)
        if "first_frame" in given:
            first = given["first_frame"]
            x = replaced(x, first)
            timestep = self._per_token(config, x, timestep, first.shape[2])
        return {"hidden_states": x, "timestep": timestep, **rest}

    def _per_token(self, config: Config, x: torch.Tensor, timestep: torch.Tensor, clean: int) -> torch.Tensor:
        """Timesteps [n, tokens], 0 for the tokens of the `clean` first frames."""
        t, h, w = config["patch_size"]
        frames, each = x.shape[2] // t, (x.shape[3] // h) * (x.shape[4] // w)
        noisy = torch.arange(frames, device=x.device).repeat_interleave(each) >= clean
        return timestep[:, None] * noisy

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return leading_to(given["first_frame"], output, x, timestep) if "first_frame" in given else output

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        made = {"encoder_hidden_states": normal(draw, batch, tokens, config["text_dim"])}
        if config["in_channels"] != config["out_channels"]:
            beside = config["in_channels"] - config["out_channels"]
            made["condition"] = normal(draw, batch, beside, *shape)
        if config["image_dim"] is not None:
            made["encoder_hidden_states_image"] = normal(draw, batch, 4, config["image_dim"])
        return made

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": embeds}

    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        if pipeline.config.expand_timesteps:
            return {"first_frame": encode_clips(pipeline.vae, clips[:, :, :1])}
        conditions, embeds = [], []
        _, _, frames, height, width = clips.shape
        unused = torch.zeros(1)  # the pipeline would draw noise otherwise
        for clip in clips:
            made = pipeline.prepare_latents(
                clip[:, 0][None], 1, 1, height, width, frames, torch.float32, clip.device, None, unused
            )
            conditions.append(made[1])
            if pipeline.image_encoder is not None:
                embeds.append(pipeline.encode_image(picture_of(clip), clip.device))
        found = {"condition": torch.cat(conditions)}
        return found | ({"encoder_hidden_states_image": torch.cat(embeds)} if embeds else {})

    def channels(self, config: Config) -> int:
        return int(config["out_channels"])
