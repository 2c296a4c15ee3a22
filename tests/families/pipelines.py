"""A tiny random pipeline of every family, of stock classes only, as `save_pretrained` writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.families import encoders
from tests.families.encoders import WIDTH, clip, llama, t5, tokenizer
from tests.families.image_pipelines import flux, qwen_image, sd3
from tests.families.wan_pipelines import wan, wan_a14b, wan_a14b_i2v, wan_i2v, wan_ti2v

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Tiny:
    """How to build one, and what it samples.

    Attributes:
        build: the whole pipeline.
        size: (frames, height, width) of its clips in pixels.
        blocks: main blocks of its transformer.
        guidance: its teacher's guidance scale.
    """

    build: Callable[[], Any]
    size: Size
    blocks: int
    guidance: float = 3.0
    embedded: float | None = None


def save(name: str, folder: Path) -> Path:
    """Write the pipeline to `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (EXPORTED | EXPERTS)[name].build().save_pretrained(str(folder), safe_serialization=True)
    return folder


def _hunyuan_transformer(**more: Any) -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    settings: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(**(settings | more)).eval()


def _hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def hunyuan_video() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = llama(), tokenizer(), _hunyuan_transformer(), _hunyuan_vae(), scheduler
    return HunyuanVideoPipeline(*parts, clip(), tokenizer())


def _hunyuan_video_i2v(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoImageToVideoPipeline
    from transformers import CLIPImageProcessor

    return HunyuanVideoImageToVideoPipeline(
        text_encoder=encoders.llava(),
        tokenizer=encoders.llava_tokenizer(),
        transformer=_hunyuan_transformer(**more),
        vae=_hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer(),
        image_processor=CLIPImageProcessor(crop_size=48, size=48),
    )


def hunyuan_video_i2v_concat() -> Any:
    """As HunyuanVideo-I2V-33ch: no embedded guidance."""
    return _hunyuan_video_i2v(in_channels=9, guidance_embeds=False, image_condition_type="latent_concat")


def hunyuan_video_i2v_replace() -> Any:
    return _hunyuan_video_i2v(image_condition_type="token_replace")


def _cogvideox(pipeline: str, autoencoder: dict[str, Any] | None = None, **more: Any) -> Any:
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": WIDTH,
        "num_layers": 4,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": True,
    }
    transformer = CogVideoXTransformer3DModel(**(settings | more)).eval()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        **(autoencoder or {}),
    ).eval()
    scheduler = CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    return getattr(diffusers, pipeline)(tokenizer(), t5(), vae, transformer, scheduler)


def cogvideox_i2v() -> Any:
    """As CogVideoX-5b-I2V: learned positions for one size."""
    learned: dict[str, Any] = {"use_learned_positional_embeddings": True, "sample_width": 8, "sample_height": 8}
    return _cogvideox("CogVideoXImageToVideoPipeline", in_channels=8, **learned)


def cogvideox_15_i2v() -> Any:
    """As CogVideoX1.5-5B-I2V: tokens of two latent frames, and a first frame scaled another way."""
    patches: dict[str, Any] = {
        "patch_size_t": 2,
        "patch_bias": False,
        "ofs_embed_dim": 2,
        "sample_width": 8,
        "sample_height": 8,
    }
    return _cogvideox("CogVideoXImageToVideoPipeline", {"invert_scale_latents": True}, in_channels=8, **patches)


def ltx() -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=WIDTH,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        patch_size_t=1,
    ).eval()
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTXPipeline(scheduler, vae, t5(), tokenizer(), transformer)


def mochi() -> Any:
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=WIDTH,
        time_embed_dim=4,
        max_sequence_length=16,
    ).eval()
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, t5(), tokenizer(), transformer)


TINY: dict[str, Tiny] = {
    "wan": Tiny(wan, (9, 32, 32), 4),
    "wan-i2v": Tiny(wan_i2v, (9, 32, 32), 4),
    "wan-ti2v": Tiny(wan_ti2v, (9, 32, 32), 4),
    "hunyuan-video": Tiny(hunyuan_video, (9, 32, 32), 4, guidance=1.0, embedded=6.0),
    "hunyuan-video-i2v-concat": Tiny(hunyuan_video_i2v_concat, (9, 32, 32), 4, guidance=1.0),
    "hunyuan-video-i2v-replace": Tiny(hunyuan_video_i2v_replace, (9, 32, 32), 4, guidance=3.0, embedded=6.0),
    "cogvideox": Tiny(lambda: _cogvideox("CogVideoXPipeline"), (9, 32, 32), 4),
    "cogvideox-i2v": Tiny(cogvideox_i2v, (9, 64, 64), 4),
    "cogvideox-1.5-i2v": Tiny(cogvideox_15_i2v, (9, 32, 32), 4),
    "ltx": Tiny(ltx, (9, 32, 32), 4),
    "mochi": Tiny(mochi, (7, 32, 32), 4),
    "flux": Tiny(flux, (1, 16, 16), 4, guidance=1.0, embedded=3.5),
    "sd3": Tiny(sd3, (1, 16, 16), 5),
    "qwen-image": Tiny(qwen_image, (1, 32, 32), 4),
}

SINE: dict[str, Any] = {"use_rotary_positional_embeddings": False}
"""CogVideoX 2B: positions are sines added to the tokens; learned ones are those of CogVideoX 5B I2V."""

EXPORTED: dict[str, Tiny] = TINY | {
    "cogvideox-2b": Tiny(lambda: _cogvideox("CogVideoXPipeline", **SINE), (9, 32, 32), 4),
}
"""And variants of a family that differ in nothing but what an export has to do about them."""
EXPERTS: dict[str, Tiny] = {
    "wan-a14b": Tiny(wan_a14b, (9, 32, 32), 4),
    "wan-a14b-i2v": Tiny(wan_a14b_i2v, (9, 32, 32), 4),
}
"""Pipelines with two experts: a recipe has to choose one."""
