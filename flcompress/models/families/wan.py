"""Wan 2.1 (text or image to video) and Wan 2.2 TI2V-5B, whose first latent frame can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families.family import Config, Family, LatentShape, normal


class Wan(Family):
    """Image to video comes in two forms: a condition beside the latents, or ("first_frame") clean first tokens."""

    name: ClassVar[str] = "Wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        rest = {name: given[name] for name in ("encoder_hidden_states", "encoder_hidden_states_image") if name in given}
        if "condition" in given:
            x = torch.cat([x, given["condition"].to(x.dtype)], dim=1)
        if "first_frame" in given:
            first = given["first_frame"]
            x = torch.cat([first.to(x.dtype), x[:, :, first.shape[2] :]], dim=2)
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
        if "first_frame" not in given:
            return output
        # The velocity that leads exactly to the given frame, so that no loss and no sampler has to know of it.
        first = given["first_frame"].to(x.dtype)
        level = (timestep / 1000.0).clamp(min=1e-3).reshape(-1, 1, 1, 1, 1)
        known = (x[:, :, : first.shape[2]] - first) / level
        return torch.cat([known.to(output.dtype), output[:, :, first.shape[2] :]], dim=2)

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

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str], length: int) -> dict[str, torch.Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=length,
            device=pipeline.text_encoder.device,
        )
        return {"encoder_hidden_states": embeds}

    def image_conditioning(self, pipeline: Any, clips: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        if pipeline.config.expand_timesteps:
            return {"first_frame": latents[:, :, :1].clone()}  # the autoencoder codes the first frame by itself
        conditions, embeds = [], []
        _, _, frames, height, width = clips.shape
        for clip, like in zip(clips, latents, strict=True):
            first = clip[:, 0][None]
            made = pipeline.prepare_latents(
                first, 1, len(like), height, width, frames, torch.float32, clip.device, None, like[None]
            )
            conditions.append(made[1])
            if pipeline.image_encoder is not None:
                picture = ((first[0] + 1.0) / 2.0).clamp(0.0, 1.0)
                embeds.append(pipeline.encode_image(_picture(picture), clip.device))
        found = {"condition": torch.cat(conditions)}
        return found | ({"encoder_hidden_states_image": torch.cat(embeds)} if embeds else {})

    def channels(self, config: Config) -> int:
        return int(config["out_channels"])


def _picture(pixels: torch.Tensor) -> Any:
    """[3, height, width] in [0, 1] as the image file that a user would give."""
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0) * 255.0).round().byte().cpu().numpy())
