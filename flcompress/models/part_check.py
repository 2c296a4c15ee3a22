"""Checks, before any work, that a part of a pipeline loads completely: configurations and headers of files.

Stock loading draws a tensor that it does not find at random, ignores one that it does not know, and puts an empty
vocabulary in place of a missing one. Here each of them is an error.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from flcompress.errors import ModelError
from flcompress.models.configs import BUILD_ERRORS, build_error, check_config, read_json, settings
from flcompress.models.shards import StoredTensor, folder_tensors
from flcompress.models.stock import (
    WITH_WEIGHTS,
    Fit,
    diffusers_fit,
    quiet_loading,
    state_shapes,
    stock_class,
    transformers_fit,
)
from flcompress.models.stock_files import stock_files

_SCALES = re.compile(
    r"(^|\.)(scaled_fp8|scale_(weight|input)|(weight|input)_scale(_inv)?|scales|absmax|quant_map|quant_state|SCB|qweight|"
    r"qzeros|_data|_scale|comfy_quant)(\.|$)"
)
"""Names that quantisers store next to a weight."""

_NUMBERS = re.compile(r"(.+)\._weight_(qdata|scale|zero_point)")
"""Names by which torchao stores the numbers of a weight and what scales them."""

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model")
"""Files that every tokenizer of transformers reads, whatever its class names."""


def check_part(folder: Path, kind: Sequence[str], *, weights: bool = True, quantized: bool = False) -> None:
    """Check that a component's configuration, weights and class belong together; only headers of weights are read.

    Args:
        folder: the component's.
        kind: (library, class name), as `model_index.json` has it.
        weights: False where a class with weights has none yet, only a configuration.
        quantized: whether a model of diffusers may be quantised by torchao.

    Raises:
        ModelError: names the file, and the tensor or the key.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; a {kind[1]} is expected in it")
    factory = stock_class(folder, kind)
    if not issubclass(factory, torch.nn.Module):
        if folder.name.startswith(WITH_WEIGHTS):
            raise ModelError(
                f"{folder.parent / 'model_index.json'}: {folder.name} is of class {kind[1]}, expected one with weights "
                f"of its own, such as the one that {folder.name}/config.json names"
            )
        load_tables(folder, factory)
        return
    if not weights:
        return
    config = read_json(folder / "config.json", f"the weights of a {factory.__name__} need it")
    by_torchao = quantized and _by_torchao(config)
    if not by_torchao:
        _check_not_quantised(config, folder / "config.json")
    if kind[0] == "transformers":
        _check_of_transformers(folder, factory, config)
        return
    if (name := config.get("_class_name", factory.__name__)) != factory.__name__:
        raise ModelError(
            f"{folder / 'config.json'}: _class_name is {name!r}, but model_index.json says {factory.__name__}; "
            "expected the same, copy both again"
        )
    model = _empty(factory, config, folder / "config.json")
    if by_torchao:
        check_quantized(folder, model)
    else:
        matching_tensors(folder, model)


def is_quantized(folder: Path) -> bool:
    """Return whether a model folder of diffusers is quantised by torchao."""
    return _by_torchao(read_json(folder / "config.json", "a diffusers model folder has one"))


def _by_torchao(config: Mapping[str, Any]) -> bool:
    quantisation = config.get("quantization_config")
    return isinstance(quantisation, dict) and quantisation.get("quant_method") == "torchao"


def check_quantized(folder: Path, model: Any) -> None:
    """Check that a folder holds all of a model that torchao quantised.

    Raises:
        ModelError: no weights, or weights that do not belong to the configuration.
    """
    whole: dict[str, StoredTensor] = {}
    scaled: set[str] = set()
    stored = folder_tensors(folder)
    for name, tensor in stored.items():
        match = _NUMBERS.fullmatch(name)
        if match is None:
            whole[name] = tensor
        elif match[2] == "qdata":
            whole[f"{match[1]}.weight"] = tensor
        elif match[2] == "scale":
            scaled.add(f"{match[1]}.weight")
    _check_fit(folder, Fit.between({name: tensor.shape for name, tensor in whole.items()}, state_shapes(model)), whole)
    eight_bit = {name for name in whole if name not in stored}
    for name in sorted(eight_bit ^ scaled):
        raise ModelError(
            f"{folder}: {name} has numbers without a scale, or a scale without numbers; the weights do not belong to "
            "this config.json"
        )


def matching_tensors(folder: Path, model: Any) -> dict[str, StoredTensor]:
    """Return name -> tensor on disk of all that the state dict of a model of diffusers holds.

    Raises:
        ModelError: no weights, or weights that do not belong to the configuration.
    """
    stored = folder_tensors(folder)
    fit = diffusers_fit(model, stored, sharded=stock_files(folder).index is not None)
    _check_fit(folder, fit, stored)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if tensor.is_floating_point() and not stored[name].floating:
            raise _quantised_error(stored[name].file, name, stored[name].dtype)
    return {name: stored[name] for name in expected}


def load_tables(folder: Path, factory: Any) -> Any:
    """Load a component without weights (tokenizer, image processor) by its stock class.

    Raises:
        ModelError: it cannot be loaded from its files.
    """
    names = set((getattr(factory, "vocab_files_names", None) or {}).values())
    files = {path.name for path in folder.iterdir() if path.is_file()}
    if names and not files & {*names, *_VOCABULARIES}:
        raise ModelError(
            f"{folder}: no vocabulary of a {factory.__name__}, which stock loading would replace by an empty one; "
            f"expected {' or '.join(sorted(names))}; copy the folder again"
        )
    try:
        with quiet_loading():
            return factory.from_pretrained(str(folder))
    except Exception as error:  # the library of tokenizers raises Exception itself
        for name in sorted(files):
            if name.endswith(".model"):
                _check_sentencepiece(folder / name)
        raise ModelError(
            f"{folder}: no {factory.__name__} can be loaded from its files ({type(error).__name__}: {_first(error)}); "
            "copy the folder again"
        ) from error


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Check, after stock loading, that it drew no weight at random.

    Raises:
        ModelError: it did; names the first.
    """
    shapes = {entry[0] if isinstance(entry, tuple) else entry for entry in info.get("mismatched_keys", ())}
    _check_names(folder, "missing", {*info["missing_keys"], *shapes})


def _check_of_transformers(folder: Path, factory: Any, config: Mapping[str, Any]) -> None:
    path, kind = folder / "config.json", factory.config_class
    model_type, inner = config.get("model_type"), [value for value in config.values() if isinstance(value, dict)]
    if model_type not in (None, kind.model_type) and not any(
        value.get("model_type") == kind.model_type for value in inner
    ):
        raise ModelError(
            f"{path}: model_type is {model_type!r}, expected {kind.model_type!r}, since model_index.json says "
            f"{factory.__name__}; copy both again"
        )
    if isinstance(renamed := config.get("transformers_weights"), str):
        raise ModelError(
            f"{path}: transformers_weights is {renamed!r}, which is not read; rename it to model.safetensors"
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder / 'adapter_config.json'}: an adapter, which stock loading adds to the weights only where PEFT is "
            "installed; merge it into the weights, or move it away"
        )
    stored = folder_tensors(folder)
    for name, tensor in stored.items():
        if name.endswith(("weight", "bias")) and not tensor.floating:
            raise _quantised_error(tensor.file, name, tensor.dtype)
    fit = _fit_of_transformers(folder, factory, stored)
    origin = getattr(importlib.import_module("transformers"), str((config.get("architectures") or [None])[0]), None)
    known = isinstance(origin, type) and issubclass(origin, torch.nn.Module)
    if fit.unexpected and known and not _fit_of_transformers(folder, origin, stored).unexpected:
        # A text encoder saved as a part of the whole model that it comes from: the rest is not read, and rightly so.
        fit = Fit(missing=fit.missing, unexpected=frozenset(), shapes=fit.shapes)
    _check_fit(folder, fit, stored)


def _fit_of_transformers(folder: Path, factory: Any, stored: Mapping[str, StoredTensor]) -> Fit:
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet_loading():
            config = factory.config_class.from_pretrained(str(folder))
        return transformers_fit(factory, config, stored)
    except (*BUILD_ERRORS, StrictDataclassError, OSError) as error:
        raise build_error(error, factory.__name__, folder / "config.json") from error


def _empty(factory: Any, config: Mapping[str, Any], path: Path) -> Any:
    """Build a model of diffusers whose weights have no memory."""
    from diffusers.models import transformers as denoisers

    if getattr(denoisers, factory.__name__, None) is factory:
        check_config(config, path)
    try:
        with init_empty_weights():
            return factory.from_config(settings(config, factory))
    except BUILD_ERRORS as error:
        raise build_error(error, factory.__name__, path) from error


def _check_fit(folder: Path, fit: Fit, stored: Mapping[str, StoredTensor]) -> None:
    for name in sorted(fit.unexpected):
        if _SCALES.search(name):
            raise ModelError(
                f"{folder}: tensor {name} is the scale of quantised weights, which are not read; expected the model's "
                "weights in F32, BF16 or F16"
            )
    _check_names(folder, "missing", fit.missing)
    _check_names(folder, "unexpected", fit.unexpected)
    for name, (shape, expected) in sorted(fit.shapes.items()):
        file = stored[name].file if name in stored else folder
        raise ModelError(
            f"{file}: tensor {name} has shape {list(shape)}, expected {list(expected)}; "
            "the weights do not belong to this config.json"
        )


def _check_names(folder: Path, trouble: str, names: Collection[str]) -> None:
    if names:
        raise ModelError(
            f"{folder}: {len(names)} {trouble} keys, first {min(names)}; the weights do not belong to this config.json"
        )


def _check_not_quantised(config: Mapping[str, Any], path: Path) -> None:
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        if (quantisation := section.get("quantization_config")) is not None:
            method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
            raise ModelError(
                f"{path}: quantization_config is of {method}; quantised weights are not read, expected the model's "
                "weights in F32, BF16 or F16"
            )


def _quantised_error(file: Path, name: str, dtype: str) -> ModelError:
    return ModelError(
        f"{file}: tensor {name} is stored in {dtype}; quantised weights are not read, expected the model's weights in "
        "F32, BF16 or F16"
    )


def _check_sentencepiece(path: Path) -> None:
    """Raise ModelError unless the file is a SentencePiece model; stock loading would ask for tiktoken instead."""
    if importlib.util.find_spec("sentencepiece") is None:
        raise ModelError(f"{path}: sentencepiece is not installed, which reads it; pip install sentencepiece protobuf")
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{path}: no whole SentencePiece model ({_first(error)}); copy the file again") from error


def _first(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
