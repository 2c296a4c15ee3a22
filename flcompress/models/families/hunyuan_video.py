"""HunyuanVideo: a guidance-distilled flow model with a masked language-model prompt and a pooled one.

From an image, its prompt embedding is that of a vision-language model which sees the first frame, too, and the frame's
latents come in one of two ways, which the transformer's `image_condition_type` names: "latent_concat" puts them and a
mask next to the noised ones, "token_replace" in the place of the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.conversions import normal, pad_tokens, picture_of, velocity_to, with_first
from flcompress.models.families.family import ClipSize, Compression, Config, LatentShape, OriginalNames, TokenAxes
from flcompress.models.families.shared import (
    DOUBLE_STREAM_MODULES,
    DOUBLE_STREAM_STACKS,
    EMBEDDERS,
    MASKED,
    TrueGuidance,
)
from flcompress.models.families.unmasked import MaskSwitch
from flcompress.models.video import encode_clips

ORIGINAL = OriginalNames(
    stacks={
        **DOUBLE_STREAM_STACKS,
        "txt_in.individual_token_refiner.blocks": "context_embedder.token_refiner.refiner_blocks",
    },
    modules={
        **DOUBLE_STREAM_MODULES,
        **{
            f"{original}.{layer}": f"time_text_embed.{stock}.linear_{number}"
            for original, stock in EMBEDDERS.items()
            for layer, number in (("mlp.0", 1), ("mlp.2", 2), ("in_layer", 1), ("out_layer", 2))
        },
        **{
            f"txt_in.{original}": f"context_embedder.time_text_embed.{stock}"
            for original, stock in (
                ("t_embedder.mlp.0", "timestep_embedder.linear_1"),
                ("t_embedder.mlp.2", "timestep_embedder.linear_2"),
                ("c_embedder.linear_1", "text_embedder.linear_1"),
                ("c_embedder.linear_2", "text_embedder.linear_2"),
            )
        },
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "self_attn_qkv": "attn.to_q + attn.to_k + attn.to_v",
        "self_attn.qkv": "attn.to_q + attn.to_k + attn.to_v",
        "self_attn_proj": "attn.to_out.0",
        "self_attn.proj": "attn.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "mlp.0": "ff.net.0.proj",
        "mlp.2": "ff.net.2",
        "adaLN_modulation.1": "norm_out.linear",
    },
)


class HunyuanVideo(TrueGuidance):
    """Text or image to video. The guidance scale is an input of the network; no classifier-free guidance is needed."""

    name: ClassVar[str] = "HunyuanVideo"
    pipelines: ClassVar[tuple[str, ...]] = ("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("HunyuanVideoImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("HunyuanVideoTransformer3DModel",)
    original: ClassVar[OriginalNames] = ORIGINAL
    masks_attention: ClassVar[bool] = True
    ignores_padding: ClassVar[bool] = True
    prompt_names: ClassVar[tuple[str, ...]] = (*MASKED, "pooled_projections")
    embedded_guidance: ClassVar[float | None] = 6.0
    text_stacks: ClassVar[tuple[str, ...]] = ("context_embedder.token_refiner.refiner_blocks",)
    self_attention: ClassVar[str] = "attn"

    IMAGE_TOKENS = 576
    """Tokens of a picture in the pipeline's prompt template."""
    ENDING_TOKENS = 4
    """Tokens of the template that the pipeline cuts out of what is padded to the prompt's length."""
    KEPT_IMAGE_TOKENS: ClassVar[dict[str, int]] = {"latent_concat": 2, "token_replace": 4}
    """Keep one image token in N, by the way that the first frame conditions."""
    WITHOUT_CONDITION = 2
    """N for the negative prompt, whatever the way."""
    NOISE_SHARE = 0.999
    """Share of noise in the starting latents; the rest is the first frame, in every frame."""

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        if "first_frame" in conditioning:
            first = conditioning["first_frame"].to(x.dtype)
            x = with_first(x, first) if self._replaces(config) else torch.cat([x, *_frame_and_mask(x, first)], dim=1)
        prompt = {name: conditioning[name] for name in self.prompt_names}
        arguments = {"hidden_states": x, "timestep": timestep, **prompt}
        if config["guidance_embeds"]:
            arguments["guidance"] = self.guidance_input(timestep, conditioning, guidance, 1000.0)
        return arguments

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        replaces = "first_frame" in conditioning and self._replaces(config)
        return velocity_to(conditioning["first_frame"], output, x, timestep) if replaces else output

    @override
    def mask_switch(self, transformer: Any) -> MaskSwitch | None:
        from flcompress.models.families.hunyuan_attention import mask_switch

        return mask_switch(transformer)

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        padding = tokens // 4  # as most prompts have
        tokens += self._more_tokens if self.image_condition(config) else 0
        mask = torch.ones(batch, tokens)
        mask[:, tokens - padding :] = 0.0
        conditioning = {
            "encoder_hidden_states": normal(draw, batch, tokens, config["text_embed_dim"]),
            "encoder_attention_mask": mask,
            "pooled_projections": normal(draw, batch, config["pooled_projection_dim"]),
        }
        if self.image_condition(config):
            conditioning["first_frame"] = normal(draw, batch, self.channels(config), 1, *shape[1:])
        return conditioning

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        if type(pipeline).__name__ in self.from_image:
            return self._with_pictures(pipeline, [_black()] * len(prompts), prompts, length, self.WITHOUT_CONDITION)
        embeds, pooled, mask = pipeline.encode_prompt(
            list(prompts), max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return _prompt(embeds, mask, pooled)

    @override
    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        interval = self.KEPT_IMAGE_TOKENS[str(self.image_condition(config))]
        prompt = self._with_pictures(pipeline, [picture_of(clip) for clip in clips], prompts, length, interval)
        return {**prompt, "first_frame": encode_clips(pipeline.vae, clips[:, :, :1])}

    def _with_pictures(
        self, pipeline: Any, pictures: Sequence[Any], prompts: Sequence[str], length: int, interval: int
    ) -> dict[str, torch.Tensor]:
        """Encode prompts with pictures, keeping one picture token in every `interval`.

        All are padded to one length, so that a prompt can stand for another (the network does not see padding).
        """
        encoded = []
        # One at a time: the pipeline cuts a prompt that is too long rightly only when it is alone.
        for picture, text in zip(pictures, prompts, strict=True):
            embeds, pooled, mask = pipeline.encode_prompt(
                picture,
                text,
                max_sequence_length=length,
                image_embed_interleave=interval,
                device=pipeline.text_encoder.device,
            )
            total = length + self._more_tokens
            encoded.append(_prompt(pad_tokens(embeds, total), pad_tokens(mask, total), pooled))
        return {name: torch.cat([prompt[name] for prompt in encoded]) for name in self.prompt_names}

    @property
    def _more_tokens(self) -> int:
        return self.IMAGE_TOKENS // min(self.KEPT_IMAGE_TOKENS.values()) - self.ENDING_TOKENS

    @override
    def image_condition(self, config: Config) -> str | None:
        kind: str | None = config.get("image_condition_type")
        return kind

    def _replaces(self, config: Config) -> bool:
        return self.image_condition(config) == "token_replace"

    @override
    def start(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if "first_frame" not in conditioning:
            return noise
        return noise * self.NOISE_SHARE + conditioning["first_frame"].to(noise) * (1.0 - self.NOISE_SHARE)

    @override
    def end(self, config: Config, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        replaces = "first_frame" in conditioning and self._replaces(config)
        return with_first(x, conditioning["first_frame"]) if replaces else x

    @override
    def frame_rate(self, index: Config, config: Config) -> float:
        return 24.0

    @override
    def compression(self, autoencoder: Config) -> Compression:
        return int(autoencoder["temporal_compression_ratio"]), int(autoencoder["spatial_compression_ratio"])

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (4, 8), ClipSize(height=720, width=1280, frames=129, tokens=256)

    @override
    def cut_frames(self, config: Config) -> int:
        return 4 if self.image_condition(config) == "latent_concat" else 0

    @override
    def token_axes(self, config: Config) -> TokenAxes | None:
        if self._replaces(config):  # its blocks count the tokens of the first frame
            return None
        heads = int(config["num_attention_heads"])
        return TokenAxes(heads=heads, outputs={"x_embedder": 1, "rope": 0})

    @override
    def channels(self, config: Config) -> int:
        channels = int(config["in_channels"])
        return (channels - 1) // 2 if self.image_condition(config) == "latent_concat" else channels


def _prompt(embeds: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask.to(embeds.dtype),
        "pooled_projections": pooled,
    }


def _frame_and_mask(x: torch.Tensor, first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first frame's latents in an otherwise empty clip, and the mask of where they are."""
    mask = torch.zeros_like(x[:, :1])
    mask[:, :, :1] = 1.0
    return first * mask, mask


def _black() -> Any:
    """Return what the pipeline shows with a negative prompt; its own size is scaled away."""
    from PIL import Image

    return Image.new("RGB", (64, 64), 0)
