"""HunyuanVideo: a guidance-distilled flow model with a masked language-model prompt and a pooled one.

From an image, its prompt embedding is that of a vision-language model which sees the first frame, too, and the frame's
latents come in one of two ways, which the transformer's `image_condition_type` names: "latent_concat" puts them and a
mask beside the noised ones, "token_replace" in the place of the first of them.
"""

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
    evenly,
    leading_to,
    normal,
    padded,
    picture_of,
    replaced,
)
from flcompress.models.families.original_names import OriginalNames
from flcompress.models.video import encode_clips


class HunyuanVideo(Family):
    """Text or image to video. The network is told its guidance scale; classifier-free guidance is not needed on top."""

    name: ClassVar[str] = "HunyuanVideo"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("HunyuanVideoImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)
    original: ClassVar[OriginalNames] = original_names.HUNYUAN_VIDEO
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
    embedded_guidance: ClassVar[float | None] = 6.0

    IMAGE_TOKENS = 576
    """Of a picture, in the pipeline's prompt template."""
    ENDING_TOKENS = 4
    """Of the template, that the pipeline cuts out of what is padded to the prompt's length."""
    KEPT_IMAGE_TOKENS: ClassVar[dict[str, int]] = {"latent_concat": 2, "token_replace": 4}
    """One of so many, by the way that the first frame conditions."""
    WITHOUT_CONDITION = 2
    """The same for the negative prompt, whatever the way."""
    NOISE_SHARE = 0.999
    """Of the starting latents; the rest is the first frame, in every frame."""

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        if "first_frame" in given:
            first = given["first_frame"].to(x.dtype)
            x = replaced(x, first) if self._replaces(config) else torch.cat([x, *_beside(x, first)], dim=1)
        made = {"hidden_states": x, "timestep": timestep, **{name: given[name] for name in self.prompt_names}}
        if config["guidance_embeds"]:
            scale = self.embedded_guidance if guidance is None else guidance
            made["guidance"] = torch.full_like(timestep, 1000.0 * float(scale or 1.0))
        return made

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        held = "first_frame" in given and self._replaces(config)
        return leading_to(given["first_frame"], output, x, timestep) if held else output

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        padding = tokens // 4  # as most prompts have
        tokens += self._more_tokens if self.image_condition(config) else 0
        mask = torch.ones(batch, tokens)
        mask[:, tokens - padding :] = 0.0
        made = {
            "encoder_hidden_states": normal(draw, batch, tokens, config["text_embed_dim"]),
            "encoder_attention_mask": mask,
            "pooled_projections": normal(draw, batch, config["pooled_projection_dim"]),
        }
        if self.image_condition(config):
            made["first_frame"] = normal(draw, batch, self.channels(config), 1, *shape[1:])
        return made

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        if type(pipeline).__name__ in self.from_image:
            return self._seen(pipeline, [_black()] * len(prompts), prompts, length, self.WITHOUT_CONDITION)
        embeds, pooled, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return _prompt(embeds, mask, pooled)

    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        kept = self.KEPT_IMAGE_TOKENS[str(self.image_condition(config))]
        made = self._seen(pipeline, [picture_of(clip) for clip in clips], prompts, length, kept)
        return {**made, "first_frame": encode_clips(pipeline.vae, clips[:, :, :1])}

    def _seen(
        self, pipeline: Any, pictures: Sequence[Any], prompts: Sequence[str], length: int, kept: int
    ) -> dict[str, torch.Tensor]:
        """Prompts beside pictures, of whose tokens one of `kept` is kept.

        All are padded to one length, so that a prompt can stand for another (the network does not see padding).
        """
        made = []
        # One at a time: the pipeline cuts a prompt that is too long rightly only when it is alone.
        for picture, prompt in zip(pictures, prompts, strict=True):
            embeds, pooled, mask = pipeline.encode_prompt(
                picture,
                prompt,
                max_sequence_length=length,
                image_embed_interleave=kept,
                device=pipeline.text_encoder.device,
            )
            whole = length + self._more_tokens
            made.append(_prompt(padded(embeds, whole), padded(mask, whole), pooled))
        return {name: torch.cat([one[name] for one in made]) for name in self.prompt_names}

    @property
    def _more_tokens(self) -> int:
        return self.IMAGE_TOKENS // min(self.KEPT_IMAGE_TOKENS.values()) - self.ENDING_TOKENS

    def image_condition(self, config: Config) -> str | None:
        found: str | None = config.get("image_condition_type")
        return found

    def _replaces(self, config: Config) -> bool:
        return self.image_condition(config) == "token_replace"

    def start(self, noise: torch.Tensor, given: Conditioning) -> torch.Tensor:
        if "first_frame" not in given:
            return noise
        return noise * self.NOISE_SHARE + given["first_frame"].to(noise) * (1.0 - self.NOISE_SHARE)

    def cut_frames(self, config: Config) -> int:
        return 4 if self.image_condition(config) == "latent_concat" else 0

    def channels(self, config: Config) -> int:
        channels = int(config["in_channels"])
        return (channels - 1) // 2 if self.image_condition(config) == "latent_concat" else channels

    def call(self, guidance_scale: float, embedded: float | None) -> dict[str, float]:
        # The pipeline's guidance_scale is the embedded one; the other is called true_cfg_scale.
        told = {} if embedded is None else {"guidance_scale": embedded}
        return {**told, "true_cfg_scale": guidance_scale}

    def sigmas(self, steps: int) -> Sequence[float] | None:
        return evenly(steps)


def _prompt(embeds: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask.to(embeds.dtype),
        "pooled_projections": pooled,
    }


def _beside(x: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first frame's latents in a clip that is empty otherwise, and the mask that tells where they are."""
    mask = torch.zeros_like(x[:, :1])
    mask[:, :, :1] = 1.0
    return first * mask, mask


def _black() -> Any:
    """What the pipeline shows beside a negative prompt; its own size is scaled away."""
    from PIL import Image

    return Image.new("RGB", (64, 64), 0)
