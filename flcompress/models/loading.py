"""Load the parts of a pipeline folder by stock classes; safetensors only, no code from the folder is run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.folder import check_transformer_config, read_json
from flcompress.models.parts import load_part
from flcompress.models.quiet import no_progress_bars


@no_progress_bars()
def load_transformer(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The transformer, in evaluation mode, without gradients; in fp32 where no dtype is given."""
    factory, kept = transformer_class(folder), {} if dtype is None else {"torch_dtype": dtype}
    model, info = factory.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True, **kept)
    # Stock loading is silent about missing and unexpected tensors; such a model is wrong.
    for trouble in ("missing_keys", "unexpected_keys"):
        if info[trouble]:
            raise ModelError(
                f"{folder}: {len(info[trouble])} {trouble.replace('_', ' ')}, first {info[trouble][0]}; "
                "the weights do not belong to this config.json"
            )
    return frozen(model).to(device)


def transformer_class(folder: Path) -> Any:
    """The stock class that a transformer folder's configuration names."""
    import diffusers

    return getattr(diffusers, check_transformer_config(folder)["_class_name"])


def meta_transformer(folder: Path) -> Any:
    """The transformer from its configuration alone, on the meta device: no weights, no memory."""
    config = check_transformer_config(folder)
    with torch.device("meta"):
        return transformer_class(folder).from_config(config).eval()


@no_progress_bars()
def load_vae(folder: Path, device: str = "cpu") -> Any:
    """The autoencoder, in evaluation mode, without gradients."""
    config = read_json(folder / "config.json", "a diffusers model folder has one")
    return load_part(folder, ("diffusers", config["_class_name"]), device)


def frozen(model: Any) -> Any:
    """The model in evaluation mode with `requires_grad` off everywhere."""
    return model.eval().requires_grad_(False)


@no_progress_bars()
def initialise_pipeline(source: Path, target: Path, seed: int) -> None:
    """Write to `target` the pipeline whose configurations lie in `source`, with random weights drawn from `seed`.

    The start of a recipe that trains a model from nothing. What has no weights (tokenizer, scheduler) is copied.
    """
    import diffusers
    import transformers

    index = read_json(source / "model_index.json", "a diffusers pipeline folder has one")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, kind in sorted(index.items()):
            if not isinstance(kind, list) or kind[0] is None:
                continue
            folder = source / name
            factory = getattr(diffusers if kind[0] == "diffusers" else transformers, kind[1])
            if not issubclass(factory, torch.nn.Module):
                shutil.copytree(folder, target / name)
            elif kind[0] == "diffusers":
                config = read_json(folder / "config.json", "a diffusers model folder has one")
                factory.from_config(config).save_pretrained(str(target / name))
            else:
                factory(factory.config_class.from_pretrained(str(folder))).save_pretrained(str(target / name))
    shutil.copy(source / "model_index.json", target / "model_index.json")
