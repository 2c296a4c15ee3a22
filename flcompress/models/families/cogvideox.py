"""CogVideoX: a discrete process with v-prediction; latents with the frames before the channels; rotary inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from flcompress.diffusion.conditioning import Conditioning
from flcompress.models.families import original_names
from flcompress.models.families.family import Config, Family, LatentShape, normal
from flcompress.models.families.original_names import OriginalNames
from flcompress.models.video import encode_clips


class CogVideoX(Family):
    """Text to video, and image to video with the first frame's latents beside the noised ones."""

    name: ClassVar[str] = "CogVideoX"
    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("CogVideoXImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("CogVideoXTransformer3DModel",)
    original: ClassVar[OriginalNames] = original_names.COGVIDEOX

    def arguments(
        self, config: Config, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, guidance: float | None
    ) -> dict[str, Any]:
        if "image_latents" in given:
            x = torch.cat([x, given["image_latents"].to(x.dtype)], dim=1)
        made: dict[str, Any] = {
            "hidden_states": x.transpose(1, 2),
            "timestep": timestep,
            "encoder_hidden_states": given["encoder_hidden_states"],
        }
        if config["use_rotary_positional_embeddings"]:
            made["image_rotary_emb"] = rotary_table(config, (x.shape[2], x.shape[3], x.shape[4]), x.device)
        if config["ofs_embed_dim"] is not None:
            made["ofs"] = torch.full_like(timestep[:1], 2.0)
        return made

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> torch.Tensor:
        return output.transpose(1, 2)

    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        # A table of positions fixes the number of tokens; rotary ones alone do not.
        table = not config["use_rotary_positional_embeddings"] or self.fixed_latents(config)
        length = config["max_text_seq_length"] if table else tokens
        made = {"encoder_hidden_states": normal(draw, batch, length, config["text_embed_dim"])}
        if config["in_channels"] != config["out_channels"]:
            made["image_latents"] = normal(draw, batch, config["in_channels"] - config["out_channels"], *shape)
        return made

    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), None, False, max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": embeds}

    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        # The pipeline codes the first frame by itself (in a clip its code would depend on the others) and leaves the
        # other frames empty.
        vae = pipeline.vae
        first = encode_clips(vae, clips[:, :, :1])
        if vae.config.invert_scale_latents:
            first = first / vae.config.scaling_factor**2  # as CogVideoX 1.5 was trained
        empty = (clips.shape[2] - 1) // pipeline.vae_scale_factor_temporal + self.patch(config)[0] - 1
        return {"image_latents": F.pad(first, (0, 0, 0, 0, 0, empty))}

    def noise(self, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
        channels, frames, *rest = shape
        return torch.randn(1, frames, channels, *rest, generator=draw).transpose(1, 2)

    def fixed_latents(self, config: Config) -> LatentShape | None:
        if not config.get("use_learned_positional_embeddings"):
            return None
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        return frames, config["sample_height"], config["sample_width"]

    def channels(self, config: Config) -> int:
        return int(config["out_channels"])


def rotary_table(config: Config, shape: LatentShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [tokens, head channels] at a latent size, as the pipelines of CogVideoX 1.0 and 1.5 make them."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = shape
    patch, over_time = config["patch_size"], config["patch_size_t"]
    grid = (height // patch, width // patch)
    base_height, base_width = config["sample_height"] // patch, config["sample_width"] // patch
    if over_time is None:
        crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
        made = get_3d_rotary_pos_embed(config["attention_head_dim"], crops, grid, frames, device="cpu")
    else:
        made = get_3d_rotary_pos_embed(
            config["attention_head_dim"],
            None,
            grid,
            (frames + over_time - 1) // over_time,
            grid_type="slice",
            max_size=(base_height, base_width),
            device="cpu",
        )
    cos, sin = made
    return cos.to(device), sin.to(device)
