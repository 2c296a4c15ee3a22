"""The tiny random pipelines of Wan, of one transformer and of two experts."""

from __future__ import annotations

from typing import Any

from tests.families import encoders
from tests.families.encoders import WIDTH, tokenizer, umt5


def _wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        scale_factor_spatial=8,
        scale_factor_temporal=4,
    ).eval()


def _wan_transformer(**more: Any) -> Any:
    from diffusers import WanTransformer3DModel

    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 4,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**(settings | more)).eval()


def wan() -> Any:
    """As the real ones are saved: with a multistep solver of flow sigmas."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer(), umt5(), _wan_vae(), scheduler, _wan_transformer())


def wan_i2v() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor

    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        image_encoder=encoders.clip_vision(),
        transformer=_wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=24),
    )


def wan_ti2v() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=_wan_transformer(),
        expand_timesteps=True,
    )


def wan_a14b() -> Any:
    """Wan 2.2 A14B: two experts, of two depths here, so that taking one for the other is found out."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(
        tokenizer(),
        umt5(),
        _wan_vae(),
        scheduler,
        _wan_transformer(),
        transformer_2=_wan_transformer(num_layers=6),
        boundary_ratio=0.875,
    )


def wan_a14b_i2v() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=tokenizer(),
        text_encoder=umt5(),
        vae=_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=_wan_transformer(in_channels=36),
        transformer_2=_wan_transformer(in_channels=36, num_layers=6),
        boundary_ratio=0.9,
    )
