"""LTX-Video: a flow model over a plain sequence of tokens, whose prompt comes with a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.conversions import even_sigmas
from flcompress.models.families.family import ClipSize, Compression, Config, Family, LatentShape, OriginalNames
from flcompress.models.families.shared import MASKED, masked_example, masked_prompts

ORIGINAL = OriginalNames(
    modules={
        "patchify_proj": "proj_in",
        "adaln_single.linear": "time_embed.linear",
        **{
            f"adaln_single.emb.timestep_embedder.linear_{number}": f"time_embed.emb.timestep_embedder.linear_{number}"
            for number in (1, 2)
        },
        **{f"attn{number}.{part}_norm": f"attn{number}.norm_{part}" for number in (1, 2) for part in "qk"},
    }
)


class LTX(Family):
    """Text to video. Latents become a plain sequence of tokens; positions are scaled to seconds and pixels."""

    name: ClassVar[str] = "LTX"
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("LTXVideoTransformer3DModel",)
    original: ClassVar[OriginalNames] = ORIGINAL
    masks_attention: ClassVar[bool] = True
    ignores_padding: ClassVar[bool] = True
    prompt_names: ClassVar[tuple[str, ...]] = (*MASKED, "rope_interpolation_scale")
    attends_to_text: ClassVar[bool] = False
    fp32_arguments: ClassVar[tuple[str, ...]] = ("timestep", "guidance", "video_coords")

    FRAME_RATE = 25.0
    """The pipeline's own default; positions in time are seconds."""

    @override
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": x.flatten(2).transpose(1, 2),
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
            "timestep": timestep,
            "encoder_attention_mask": conditioning["encoder_attention_mask"],
            "num_frames": x.shape[2],
            "height": x.shape[3],
            "width": x.shape[4],
            "rope_interpolation_scale": tuple(conditioning["rope_interpolation_scale"][0].tolist()),
        }

    @override
    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        return output.transpose(1, 2).reshape(x.shape)

    @override
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {
            **masked_example(batch, tokens, config["caption_channels"], draw),
            "rope_interpolation_scale": self._scale(8, 32).expand(batch, 3),
        }

    @override
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        scale = self._scale(pipeline.vae_temporal_compression_ratio, pipeline.vae_spatial_compression_ratio)
        return {**masked_prompts(pipeline, prompts, length), "rope_interpolation_scale": scale.repeat(len(prompts), 1)}

    @override
    def frame_rate(self, index: Config, config: Config) -> float:
        return self.FRAME_RATE

    def _scale(self, over_time: int, over_space: int) -> torch.Tensor:
        return torch.tensor([[over_time / self.FRAME_RATE, float(over_space), float(over_space)]])

    @override
    def compression(self, autoencoder: Config) -> Compression:
        halvings = sum(map(bool, autoencoder["spatio_temporal_scaling"]))
        return autoencoder["patch_size_t"] * 2**halvings, autoencoder["patch_size"] * 2**halvings

    @override
    def usual(self, config: Config) -> tuple[Compression, ClipSize]:
        return (8, 32), ClipSize(height=512, width=704, frames=161, tokens=128)

    @override
    def needs_vae(self, pipeline: str) -> bool:
        return True  # which tells it the compression that positions are scaled by

    @override
    def sigmas(self, steps: int, scheduler: Config) -> Sequence[float] | None:
        return even_sigmas(steps)

    @override
    def sequence_length(self, config: Config, shape: LatentShape) -> int:
        return shape[0] * shape[1] * shape[2]

    @override
    def export_arguments(self, config: Config, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return `video_coords`, which the forward takes too, in place of the sizes that it would make them from."""
        tensors = dict(arguments)
        shape = [tensors.pop(name) for name in ("num_frames", "height", "width")]
        patches = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        scales = zip(tensors.pop("rope_interpolation_scale"), patches, strict=True)
        axes = torch.meshgrid(*(torch.arange(count, dtype=torch.float32) for count in shape), indexing="ij")
        coords = torch.stack([axis * scale * patch for axis, (scale, patch) in zip(axes, scales, strict=True)])
        x = tensors["hidden_states"]
        tensors["video_coords"] = coords.flatten(1).expand(len(x), -1, -1).contiguous().to(x.device)
        return tensors
