"""Load the parts of a pipeline folder by stock classes; safetensors only, no code from the folder is run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from flcompress.models.configs import (
    BUILD_ERRORS,
    build_error,
    check_config,
    check_transformer_config,
    read_index,
    read_json,
    settings,
)
from flcompress.models.part_check import check_loaded, matching_tensors
from flcompress.models.parts import load_part
from flcompress.models.shards import InterpolatedTensor, StoredTensor, Writable, write_model
from flcompress.models.stock import no_progress_bars, stock_class
from flcompress.models.stock_files import stock_files


@no_progress_bars()
def load_transformer(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Return the transformer, in evaluation mode, without gradients; in fp32 by default."""
    stock = transformer_class(folder)
    # Stock loading is silent about missing and unexpected tensors; such a model is wrong.
    matching_tensors(folder, meta_transformer(folder))
    kept = {} if dtype is None else {"torch_dtype": dtype}
    variant = stock_files(folder).variant
    model, info = stock.from_pretrained(
        str(folder), use_safetensors=True, variant=variant, output_loading_info=True, **kept
    )
    check_loaded(folder, info)
    if dtype is not None:
        # Weights are mapped from their files. The few that a class keeps in fp32 would hold the whole files in memory.
        for value in (*model.parameters(), *model.buffers()):
            if value.dtype != dtype:
                value.data = value.data.clone()
    return frozen(model).to(device)


def empty_transformer(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Any, dict[str, StoredTensor]]:
    """Return what `load_transformer` does, before its weights have memory: for engines and exports of large models.

    Parameters are on the meta device, in the dtype that stock loading gives them. Buffers are on `device`; those that
    no file holds (rotary tables) have their numbers, computed as in stock loading.

    Returns:
        The model, and name -> tensor on disk of all that its state dict holds; what is read into one takes its dtype.

    Raises:
        ModelError: the weights do not belong to the configuration.
    """
    usual = torch.get_default_dtype()
    try:
        # As stock loading does: buffers are computed in this dtype too.
        torch.set_default_dtype(dtype or usual)
        with init_empty_weights(include_buffers=False):
            model = frozen(_built(folder / "config.json"))
    finally:
        torch.set_default_dtype(usual)
    stored = matching_tensors(folder, model)
    for name, tensor in model.state_dict().items():
        if dtype is not None and stored[name].floating:
            put(model, name, tensor.to(loaded_dtype(name, type(model), dtype)))
    for name, buffer in list(model.named_buffers(remove_duplicate=False)):
        put(model, name, buffer.to(device))
    return model, stored


def loaded_dtype(name: str, model_class: Any, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a floating tensor, by the rule of diffusers' `from_pretrained(torch_dtype=dtype)`.

    Args:
        name: the tensor's full name.
        model_class: the diffusers class; its `_keep_in_fp32_modules` name the fp32 islands.
        dtype: of the rest.
    """
    islands = set(model_class._keep_in_fp32_modules or ())
    return torch.float32 if islands & set(name.split(".")) else dtype


def put(model: Any, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer of that name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    parameter = isinstance(old, torch.nn.Parameter)
    setattr(module, leaf, torch.nn.Parameter(value, old.requires_grad) if parameter else value)


def transformer_class(folder: Path) -> Any:
    """Return the class that a transformer folder's configuration names; the configuration is checked."""
    path = folder / "config.json"
    return check_config(read_json(path, "a diffusers model folder has one"), path)


def meta_transformer(config_path: Path) -> Any:
    """Return the transformer of a folder or a `config.json`, on the meta device: no weights, no memory."""
    with torch.device("meta"):
        return _built(config_path / "config.json" if config_path.is_dir() else config_path).eval()


def _built(path: Path) -> Any:
    """Build the model of a `config.json`; its weights are random if the default device has memory."""
    config = read_json(path, "a diffusers model folder has one")
    stock = check_config(config, path)
    try:
        return stock.from_config(settings(config, stock))
    except BUILD_ERRORS as error:
        raise build_error(error, stock.__name__, path) from error


def save_transformer(like: Path, weights: Mapping[str, torch.Tensor], target: Path) -> None:
    """Write a transformer folder of `like`'s configuration with other weights, as stock diffusers would."""
    model = meta_transformer(like)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(str(target))


def save_interpolated(folder: Path, other: Path, share: float, target: Path) -> None:
    """Write the transformer of `folder` with a share of another's weights, (1 - share) a + share b, in little memory.

    Computed in fp64 and rounded to the dtype in `folder`; tensors of whole numbers keep every byte.

    Args:
        folder: a transformer.
        other: one of the same configuration; its dtype may differ.
        share: in [0, 1].
        target: the folder to write.

    Raises:
        ModelError: weights that are missing, short, or not those of the configuration in `folder`.
    """
    config, model = check_transformer_config(folder), meta_transformer(folder)
    theirs = matching_tensors(other, model)
    tensors: dict[str, Writable] = {
        name: InterpolatedTensor(own, theirs[name], share) if own.floating else own
        for name, own in matching_tensors(folder, model).items()
    }
    write_model(target, tensors, config)


@no_progress_bars()
def load_vae(folder: Path, device: str = "cpu") -> Any:
    """Return the autoencoder, in evaluation mode, without gradients."""
    config = read_json(folder / "config.json", "a diffusers model folder has one")
    return load_part(folder, ("diffusers", config["_class_name"]), device)


def frozen(model: Any) -> Any:
    """Return the model in evaluation mode with `requires_grad` off everywhere."""
    return model.eval().requires_grad_(False)


@no_progress_bars()
def initialise_pipeline(source: Path, target: Path, seed: int) -> None:
    """Write to `target` the pipeline whose configurations are in `source`, with random weights drawn from `seed`.

    The start of a recipe that trains a model from nothing. What has no weights (tokenizer, scheduler) is copied.
    """
    index = read_index(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, kind in sorted(index.items()):
            if not isinstance(kind, list) or kind[0] is None:
                continue
            folder = source / name
            factory = stock_class(folder, kind)
            if not issubclass(factory, torch.nn.Module):
                shutil.copytree(folder, target / name)
            elif kind[0] != "transformers":
                config = read_json(folder / "config.json", "a diffusers model folder has one")
                factory.from_config(config).save_pretrained(str(target / name))
            else:
                factory(factory.config_class.from_pretrained(str(folder))).save_pretrained(str(target / name))
    shutil.copy(source / "model_index.json", target / "model_index.json")
