"""Load the parts of a pipeline folder by stock classes; safetensors only, no code from the folder is run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.configs import BUILD_ERRORS, build_error, check_config, settings
from flcompress.models.folder import read_json
from flcompress.models.parts import load_part
from flcompress.models.quiet import no_progress_bars


@no_progress_bars()
def load_transformer(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The transformer, in evaluation mode, without gradients; in fp32 where no dtype is given."""
    stock = transformer_class(folder)
    kept = {} if dtype is None else {"torch_dtype": dtype}
    model, info = stock.from_pretrained(str(folder), use_safetensors=True, output_loading_info=True, **kept)
    # Stock loading is silent about missing and unexpected tensors; such a model is wrong.
    for trouble in ("missing_keys", "unexpected_keys"):
        if info[trouble]:
            raise ModelError(
                f"{folder}: {len(info[trouble])} {trouble.replace('_', ' ')}, first {info[trouble][0]}; "
                "the weights do not belong to this config.json"
            )
    return frozen(model).to(device)


def transformer_class(folder: Path) -> Any:
    """The stock class that a transformer folder's configuration names; the configuration is checked."""
    path = folder / "config.json"
    return check_config(read_json(path, "a diffusers model folder has one"), path)


def meta_transformer(config_path: Path) -> Any:
    """The transformer of a folder or a `config.json`, from it alone, on the meta device: no weights, no memory."""
    path = config_path / "config.json" if config_path.is_dir() else config_path
    config = read_json(path, "a diffusers model folder has one")
    stock = check_config(config, path)
    try:
        with torch.device("meta"):
            return stock.from_config(settings(config, stock)).eval()
    except BUILD_ERRORS as error:
        raise build_error(error, stock.__name__, path) from error


def save_transformer(like: Path, weights: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write a transformer folder of `like`'s configuration with other weights, as stock diffusers would."""
    model = meta_transformer(like)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(str(target))


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
