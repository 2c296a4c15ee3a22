"""Wan 2.1 (text or image to video) and Wan 2.2 TI2V-5B, whose first latent frame can be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.errors import RequestError
from flcompress.models.families.conversions import normal, picture_of, velocity_to, with_first
from flcompress.models.families.family import (
    ClipSize,
    Compression,
    Config,
    Family,
    LatentShape,
    OriginalNames,
    TokenAxes,
)
from flcompress.models.video import encode_clips

ORIGINAL = OriginalNames(
    modules={
        **{f"self_attn.{part}": f"attn1.to_{part}" for part in "qkv"},
        **{f"cross_attn.{part}": f"attn2.to_{part}" for part in "qkv"},
        **{f"self_attn.norm_{part}": f"attn1.norm_{part}" for part in "qk"},
        **{f"cross_attn.norm_{part}": f"attn2.norm_{part}" for part in "qk"},
        **{f"cross_attn.{part}_img": f"attn2.add_{part}_proj" for part in "kv"},
        "self_attn.o": "attn1.to_out.0",
        "cross_attn.o": "attn2.to_out.0",
        "cross_attn.norm_k_img": "attn2.norm_added_k",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "norm3": "norm2",
        "modulation": "scale_shift_table",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    }
)


class Wan(Family):
    """Image to video comes in two forms: a condition next to the latents, or ("first_frame") clean first tokens."""

    name: ClassVar[str] = "Wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline", "WanImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("WanImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)
    attends_to_text: ClassVar[bool] = False
    original: ClassVar[OriginalNames] = ORIGINAL

    SMALL_CHANNELS = 48
    """Of Wan 2.2 TI2V-5B, whose autoencoder compresses more."""
    IMAGE_PROMPT_TOKENS = 512
    """What the stock transformer with an image encoder takes for the prompt, whatever its length."""

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        names = ("encoder_hidden_states", "encoder_hidden_states_image")
        embeddings = {name: conditioning[name] for name in names if name in conditioning}
        if "condition" in conditioning:
            x = torch.cat([x, conditioning["condition"].to(x.dtype)], dim=1)
        if "first_frame" in conditioning:
            first = conditioning["first_frame"]
            x = with_first(x, first)
            timestep = self._per_token(config, x, timestep, first.shape[2])
        return {"hidden_states": x, "timestep": timestep, **embeddings}

    def _per_token(self, config: Config, x: torch.Tensor, timestep: torch.Tensor, clean: int) -> torch.Tensor:
        """Return timesteps [n, tokens], 0 for the tokens of the `clean` first frames."""
        t, h, w = config["patch_size"]
        frames, tokens = x.shape[2] // t, (x.shape[3] // h) * (x.shape[4] // w)
        noisy = torch.arange(frames, device=x.device).repeat_interleave(tokens) >= clean
        return timestep[:, None] * noisy

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        if "first_frame" not in conditioning:
            return output
        return velocity_to(conditioning["first_frame"], output, x, timestep)

    @override
    def token_axes(self, config: Config) -> TokenAxes:
        heads = int(config["num_attention_heads"])
        return TokenAxes(heads=heads, arguments={"timestep": 1}, outputs={"rope": 1}, grid="patch_embedding")

    @override
    def channels(self, config: Config) -> int:
        return int(config["out_channels"])

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        conditioning = {"encoder_hidden_states": normal(draw, batch, tokens, config["text_dim"])}
        if config["in_channels"] != config["out_channels"]:
            extra = config["in_channels"] - config["out_channels"]
            conditioning["condition"] = normal(draw, batch, extra, *shape)
        if config["image_dim"] is not None:
            conditioning["encoder_hidden_states_image"] = normal(draw, batch, 4, config["image_dim"])
        return conditioning

    @override
    def call_conditioning(
        self, index: Config, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        conditioning = self.example_conditioning(config, batch, shape, tokens, draw)
        if index["_class_name"] in self.from_image and index.get("expand_timesteps"):
            conditioning["first_frame"] = normal(draw, batch, self.channels(config), 1, *shape[1:])
        return conditioning

    @override
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

    @override
    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        if pipeline.config.expand_timesteps:
            return {"first_frame": encode_clips(pipeline.vae, clips[:, :, :1])}
        conditions, embeds = [], []
        _, _, frames, height, width = clips.shape
        unused = torch.zeros(1)  # the pipeline would draw noise otherwise
        for clip in clips:
            _, condition = pipeline.prepare_latents(
                clip[:, 0][None], 1, 1, height, width, frames, torch.float32, clip.device, None, unused
            )
            conditions.append(condition)
            if pipeline.image_encoder is not None:
                embeds.append(pipeline.encode_image(picture_of(clip), clip.device))
        conditioning = {"condition": torch.cat(conditions)}
        return conditioning | ({"encoder_hidden_states_image": torch.cat(embeds)} if embeds else {})

    @override
    def end(self, config: Config, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return with_first(x, conditioning["first_frame"]) if "first_frame" in conditioning else x

    @override
    def frame_rate(self, index: Config, config: Config) -> float:
        return 24.0 if index.get("expand_timesteps") else 16.0  # Wan 2.2 TI2V-5B, all others

    @override
    def compression(self, autoencoder: Config) -> Compression:
        return int(autoencoder["scale_factor_temporal"] or 4), int(autoencoder["scale_factor_spatial"] or 8)

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        if config["out_channels"] == self.SMALL_CHANNELS:
            return (4, 16), ClipSize(height=704, width=1280, frames=121, tokens=512)
        return (4, 8), ClipSize(height=480, width=832, frames=81, tokens=512)

    @override
    def check_export(self, config: Config, tokens: int) -> None:
        if config.get("added_kv_proj_dim") and tokens != self.IMAGE_PROMPT_TOKENS:
            raise RequestError(
                f"sampling.max_sequence_length: {tokens} given, but the stock {config['_class_name']} with an image "
                f"encoder takes the last {self.IMAGE_PROMPT_TOKENS} tokens for the prompt; set "
                f"sampling.max_sequence_length: {self.IMAGE_PROMPT_TOKENS}"
            )
