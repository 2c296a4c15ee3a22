"""CogVideoX: a discrete process with v-prediction; latents with the frames before the channels; rotary inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.conversions import normal
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
    stacks={"layers": "transformer_blocks"},
    modules={
        "attention.query_key_value": "attn1.to_q + attn1.to_k + attn1.to_v",
        "attention.dense": "attn1.to_out.0",
        "mlp.dense_h_to_4h": "ff.net.0.proj",
        "mlp.dense_4h_to_h": "ff.net.2",
        "mixins.patch_embed.proj": "patch_embed.proj",
        "mixins.patch_embed.text_proj": "patch_embed.text_proj",
        "mixins.final_layer.linear": "proj_out",
        "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
    },
)


class CogVideoX(Family):
    """Text to video, and image to video with the first frame's latents next to the noised ones."""

    name: ClassVar[str] = "CogVideoX"
    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline", "CogVideoXImageToVideoPipeline")
    from_image: ClassVar[tuple[str, ...]] = ("CogVideoXImageToVideoPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("CogVideoXTransformer3DModel",)
    text_first: ClassVar[bool] = True
    fp32_arguments: ClassVar[tuple[str, ...]] = ("timestep", "guidance", "image_rotary_emb")
    original: ClassVar[OriginalNames] = ORIGINAL

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        if "image_latents" in conditioning:
            x = torch.cat([x, conditioning["image_latents"].to(x.dtype)], dim=1)
        arguments: dict[str, Any] = {
            "hidden_states": x.transpose(1, 2),
            "timestep": timestep,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
        }
        if config["use_rotary_positional_embeddings"]:
            arguments["image_rotary_emb"] = _rotary_table(config, (x.shape[2], x.shape[3], x.shape[4]), x.device)
        if config["ofs_embed_dim"] is not None:
            arguments["ofs"] = torch.full_like(timestep[:1], 2.0)
        return arguments

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return output.transpose(1, 2)

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        # A table of positions fixes the number of tokens; rotary ones alone do not.
        table = not config["use_rotary_positional_embeddings"] or self.fixed_latents(config)
        length = config["max_text_seq_length"] if table else tokens
        conditioning = {"encoder_hidden_states": normal(draw, batch, length, config["text_embed_dim"])}
        if config["in_channels"] != config["out_channels"]:
            conditioning["image_latents"] = normal(draw, batch, config["in_channels"] - config["out_channels"], *shape)
        return conditioning

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        embeds, _ = pipeline.encode_prompt(
            list(prompts), None, False, max_sequence_length=length, device=pipeline.text_encoder.device
        )
        return {"encoder_hidden_states": embeds}

    @override
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

    @override
    def frame_rate(self, index: Config, config: Config) -> float:
        return 8.0 if config.get("patch_size_t") is None else 16.0  # CogVideoX, CogVideoX 1.5

    @override
    def noise(self, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
        channels, frames, *rest = shape
        return torch.randn(1, frames, channels, *rest, generator=draw).transpose(1, 2)

    @override
    def fixed_latents(self, config: Config) -> LatentShape | None:
        if not config.get("use_learned_positional_embeddings"):
            return None
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        return frames, config["sample_height"], config["sample_width"]

    @override
    def small_positions(self, config: Config) -> dict[str, Any]:
        if not config.get("use_learned_positional_embeddings"):
            return {}
        return {"sample_height": 8, "sample_width": 8, "sample_frames": 9, "max_text_seq_length": 16}

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (4, 8), ClipSize(height=480, width=720, frames=49, tokens=226)

    @override
    def token_axes(self, config: Config) -> TokenAxes:
        heads = int(config["num_attention_heads"])
        return TokenAxes(heads=heads, arguments={"image_rotary_emb": 0}, joined="patch_embed")

    @override
    def channels(self, config: Config) -> int:
        return int(config["out_channels"])

    @override
    def prepare_export(self, transformer: Any) -> None:
        """Replace sine positions (2B: neither rotary nor learned).

        The stock module keeps a table of its configuration's size, asks whether the clip has it, and else makes one in
        fp64.
        """
        from diffusers.models.embeddings import CogVideoXPatchEmbed

        for module in transformer.modules():
            if isinstance(module, CogVideoXPatchEmbed):
                module._get_positional_embeddings = partial(positions, module)
                if not module.use_learned_positional_embeddings:  # no clip has that size: never the table
                    module.sample_height = module.sample_width = module.sample_frames = -1


def _rotary_table(config: Config, shape: LatentShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rotary_table`; on a GPU it is kept, since it is made on the CPU and every forward needs it."""
    if device.type == "cpu":
        return rotary_table(config, shape, device)
    names = "attention_head_dim", "patch_size", "patch_size_t", "sample_height", "sample_width"
    return _kept_table(tuple((name, config[name]) for name in names), shape, device)


@lru_cache(4)
def _kept_table(
    config: tuple[tuple[str, Any], ...], shape: LatentShape, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(dict(config), shape, device)


def rotary_table(config: Config, shape: LatentShape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin [tokens, head channels] at a latent size, as the pipelines of CogVideoX 1.0 and 1.5 do."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = shape
    patch, over_time = config["patch_size"], config["patch_size_t"]
    grid = (height // patch, width // patch)
    base_height, base_width = config["sample_height"] // patch, config["sample_width"] // patch
    if over_time is None:
        crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
        table = get_3d_rotary_pos_embed(config["attention_head_dim"], crops, grid, frames, device="cpu")
    else:
        table = get_3d_rotary_pos_embed(
            config["attention_head_dim"],
            None,
            grid,
            (frames + over_time - 1) // over_time,
            grid_type="slice",
            max_size=(base_height, base_width),
            device="cpu",
        )
    cos, sin = table
    return cos.to(device), sin.to(device)


def positions(module: Any, height: int, width: int, frames: int, device: torch.device | None = None) -> Tensor:
    """Return sine positions [1, text and clip tokens, channels], zero for the text.

    As `CogVideoXPatchEmbed._get_positional_embeddings`, for any size and in fp32, with nothing filled in place.
    """
    times = (frames - 1) // module.temporal_compression_ratio + 1
    rows, columns = height // module.patch_size, width // module.patch_size
    over_time, over_space = module.embed_dim // 4, 3 * module.embed_dim // 8
    axes = (
        sines(over_time, times, module.temporal_interpolation_scale, device)[:, None, None],
        sines(over_space, columns, module.spatial_interpolation_scale, device)[None, None],
        sines(over_space, rows, module.spatial_interpolation_scale, device)[None, :, None],
    )
    clip = torch.cat([axis.expand(times, rows, columns, -1) for axis in axes], dim=-1).flatten(0, 2)[None]
    return torch.cat([clip.new_zeros(1, module.max_text_seq_length, module.embed_dim), clip], dim=1)


def sines(channels: int, count: int, scale: float, device: torch.device | None) -> Tensor:
    """Return sines, then cosines, of 0, 1/scale ... (count - 1)/scale at falling frequencies: [count, channels]."""
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angles = (torch.arange(count, device=device) / scale)[:, None] * frequencies.float().to(device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
