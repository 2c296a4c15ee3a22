"""Load the parts of a pipeline folder by stock classes; safetensors only, no code from the folder is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.folder import check_transformer_config
from flcompress.models.quiet import no_progress_bars


@no_progress_bars()
def load_transformer(folder: Path, device: str = "cpu") -> Any:
    """The transformer, in evaluation mode, without gradients."""
    from diffusers import WanTransformer3DModel

    check_transformer_config(folder)
    model, info = WanTransformer3DModel.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True)
    # Stock loading is silent about missing and unexpected tensors; such a model is wrong.
    for trouble in ("missing_keys", "unexpected_keys"):
        if info[trouble]:
            raise ModelError(
                f"{folder}: {len(info[trouble])} {trouble.replace('_', ' ')}, first {info[trouble][0]}; "
                "the weights do not belong to this config.json"
            )
    return frozen(model).to(device)


def meta_transformer(folder: Path) -> Any:
    """The transformer from its configuration alone, on the meta device: no weights, no memory."""
    from diffusers import WanTransformer3DModel

    config = check_transformer_config(folder)
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(config).eval()


@no_progress_bars()
def load_vae(folder: Path, device: str = "cpu") -> Any:
    """The video autoencoder, in evaluation mode, without gradients."""
    from diffusers import AutoencoderKLWan

    return frozen(AutoencoderKLWan.from_pretrained(str(folder), use_safetensors=True)).to(device)


@no_progress_bars()
def load_text(text_encoder: Path, tokenizer: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Text encoder and tokenizer."""
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    encoder = UMT5EncoderModel.from_pretrained(str(text_encoder), use_safetensors=True)
    return frozen(encoder).to(device), PreTrainedTokenizerFast.from_pretrained(str(tokenizer))


def frozen(model: Any) -> Any:
    """The model in evaluation mode with `requires_grad` off everywhere."""
    return model.eval().requires_grad_(False)


@no_progress_bars()
def initialise_pipeline(source: Path, target: Path, seed: int) -> None:
    """Write to `target` the pipeline whose configurations lie in `source`, with random weights drawn from `seed`.

    The start of a recipe that trains a model from nothing.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel.from_config(check_transformer_config(source / "transformer"))
        vae = AutoencoderKLWan.from_config(json.loads((source / "vae" / "config.json").read_text(encoding="utf-8")))
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(str(source / "text_encoder")))
    transformer.save_pretrained(str(target / "transformer"))
    vae.save_pretrained(str(target / "vae"))
    text_encoder.save_pretrained(str(target / "text_encoder"))
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(source / part, target / part)
    shutil.copy(source / "model_index.json", target / "model_index.json")
