"""Names that the families' own projects give to the modules of their transformers, which most LoRAs use.

Each table maps a module of the original code to that of the stock class: within a block, or in the whole model. "a + b"
is a layer whose rows are those of a and b, in this order; "a | b" is whichever of the two a block has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class OriginalNames:
    """One project's names.

    Attributes:
        stacks: list of blocks in the original code -> that of the stock class, with the same numbers.
        modules: module in the original code -> in the stock class.
    """

    stacks: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


WAN = OriginalNames(
    modules={
        **{f"self_attn.{one}": f"attn1.to_{one}" for one in "qkv"},
        **{f"cross_attn.{one}": f"attn2.to_{one}" for one in "qkv"},
        **{f"self_attn.norm_{one}": f"attn1.norm_{one}" for one in "qk"},
        **{f"cross_attn.norm_{one}": f"attn2.norm_{one}" for one in "qk"},
        **{f"cross_attn.{one}_img": f"attn2.add_{one}_proj" for one in "kv"},
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

_JOINT = {  # FLUX.1 and HunyuanVideo have the same double and single blocks
    "norm1.linear": ("img_mod.lin", "img_mod.linear"),
    "norm1_context.linear": ("txt_mod.lin", "txt_mod.linear"),
    "attn.to_q + attn.to_k + attn.to_v": ("img_attn.qkv", "img_attn_qkv"),
    "attn.add_q_proj + attn.add_k_proj + attn.add_v_proj": ("txt_attn.qkv", "txt_attn_qkv"),
    "attn.to_out.0": ("img_attn.proj", "img_attn_proj"),
    "attn.to_add_out": ("txt_attn.proj", "txt_attn_proj"),
    "attn.norm_q": ("img_attn.norm.query_norm", "img_attn_q_norm", "norm.query_norm", "q_norm"),
    "attn.norm_k": ("img_attn.norm.key_norm", "img_attn_k_norm", "norm.key_norm", "k_norm"),
    "attn.norm_added_q": ("txt_attn.norm.query_norm", "txt_attn_q_norm"),
    "attn.norm_added_k": ("txt_attn.norm.key_norm", "txt_attn_k_norm"),
    "ff.net.0.proj": ("img_mlp.0", "img_mlp.fc1"),
    "ff.net.2": ("img_mlp.2", "img_mlp.fc2"),
    "ff_context.net.0.proj": ("txt_mlp.0", "txt_mlp.fc1"),
    "ff_context.net.2": ("txt_mlp.2", "txt_mlp.fc2"),
    "attn.to_q + attn.to_k + attn.to_v + proj_mlp": ("linear1",),
    "proj_out": ("linear2", "final_layer.linear"),
    "norm.linear": ("modulation.lin", "modulation.linear"),
    "norm_out.linear": ("final_layer.adaLN_modulation.1",),
}
_JOINT_MODULES = {original: stock for stock, names in _JOINT.items() for original in names}
_JOINT_STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}

FLUX = OriginalNames(
    stacks=_JOINT_STACKS,
    modules={
        **_JOINT_MODULES,
        **{
            f"{original}.{side}_layer": f"time_text_embed.{stock}.linear_{number}"
            for original, stock in _EMBEDDERS.items()
            for number, side in ((1, "in"), (2, "out"))
        },
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
    },
)

HUNYUAN_VIDEO = OriginalNames(
    stacks={
        **_JOINT_STACKS,
        "txt_in.individual_token_refiner.blocks": "context_embedder.token_refiner.refiner_blocks",
    },
    modules={
        **_JOINT_MODULES,
        **{
            f"{original}.{layer}": f"time_text_embed.{stock}.linear_{number}"
            for original, stock in _EMBEDDERS.items()
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

SD3 = OriginalNames(
    stacks={"joint_blocks": "transformer_blocks"},
    modules={
        "x_block.attn.qkv": "attn.to_q + attn.to_k + attn.to_v",
        "x_block.attn2.qkv": "attn2.to_q + attn2.to_k + attn2.to_v",
        "context_block.attn.qkv": "attn.add_q_proj + attn.add_k_proj + attn.add_v_proj",
        "x_block.attn.proj": "attn.to_out.0",
        "x_block.attn2.proj": "attn2.to_out.0",
        "context_block.attn.proj": "attn.to_add_out",
        "x_block.mlp.fc1": "ff.net.0.proj",
        "x_block.mlp.fc2": "ff.net.2",
        "context_block.mlp.fc1": "ff_context.net.0.proj",
        "context_block.mlp.fc2": "ff_context.net.2",
        "x_block.adaLN_modulation.1": "norm1.linear",
        "context_block.adaLN_modulation.1": "norm1_context.linear",
        **{f"x_block.attn.ln_{one}": f"attn.norm_{one}" for one in "qk"},
        **{f"x_block.attn2.ln_{one}": f"attn2.norm_{one}" for one in "qk"},
        **{f"context_block.attn.ln_{one}": f"attn.norm_added_{one}" for one in "qk"},
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
)

LTX = OriginalNames(
    modules={
        "patchify_proj": "proj_in",
        "adaln_single.linear": "time_embed.linear",
        **{
            f"adaln_single.emb.timestep_embedder.linear_{number}": f"time_embed.emb.timestep_embedder.linear_{number}"
            for number in (1, 2)
        },
        **{f"attn{place}.{one}_norm": f"attn{place}.norm_{one}" for place in (1, 2) for one in "qk"},
    }
)

MOCHI = OriginalNames(
    stacks={"blocks": "transformer_blocks"},
    modules={
        "mod_x": "norm1.linear",
        "mod_y": "norm1_context.linear | norm1_context.linear_1",
        "attn.qkv_x": "attn1.to_q + attn1.to_k + attn1.to_v",
        "attn.qkv_y": "attn1.add_q_proj + attn1.add_k_proj + attn1.add_v_proj",
        "attn.proj_x": "attn1.to_out.0",
        "attn.proj_y": "attn1.to_add_out",
        **{f"attn.{one}_norm_x": f"attn1.norm_{one}" for one in "qk"},
        **{f"attn.{one}_norm_y": f"attn1.norm_added_{one}" for one in "qk"},
        "mlp_x.w1": "ff.net.0.proj",
        "mlp_x.w2": "ff.net.2",
        "mlp_y.w1": "ff_context.net.0.proj",
        "mlp_y.w2": "ff_context.net.2",
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
        **{f"t5_y_embedder.{one}": f"time_embed.pooler.{one}" for one in ("to_q", "to_kv", "to_out")},
        "t5_yproj": "time_embed.caption_proj",
        "final_layer.mod": "norm_out.linear",
        "final_layer.linear": "proj_out",
    },
)

COGVIDEOX = OriginalNames(
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
