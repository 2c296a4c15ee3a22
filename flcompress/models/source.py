"""Where a model's transformer configuration is: in a folder, a file, or a model on the Hub."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from flcompress.errors import ModelError
from flcompress.models.configs import read_index, transformer_class
from flcompress.models.families.registry import find_family, plugin_class

INDEX, CONFIG = "model_index.json", "config.json"
SECONDS = 5.0
"""Seconds to wait for an unreachable Hub."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The configurations of a model's transformers.

    Attributes:
        config: the transformer's `config.json`.
        pipeline: class that `model_index.json` names; None for a transformer on its own.
        others: names of the pipeline's further transformers.
        other_configs: their `config.json`, in the same order; None where it is not there.
        boundary_ratio: of two experts, the share of the timesteps below which the second answers.
    """

    config: Path
    pipeline: str | None = None
    others: tuple[str, ...] = ()
    other_configs: tuple[Path | None, ...] = ()
    boundary_ratio: float | None = None


def find_source(model: str) -> Source:
    """Find the transformer of `model`: a pipeline folder, a transformer folder, a `config.json`, or a Hub id.

    Only `model_index.json` and the transformer's `config.json` are downloaded of a model on the Hub.

    Raises:
        ModelError: none of these, a pipeline without a transformer, or a Hub that cannot be reached.
    """
    path = Path(model)
    if path.is_file():
        if path.suffix != ".json":
            raise ModelError(f"{path}: a {path.suffix or 'nameless'} file; expected a model folder or a config.json")
        return Source(config=path)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return Source(config=path / CONFIG)
        if not (path / INDEX).is_file():
            raise ModelError(
                f"{path}: no model folder; expected {INDEX} (a diffusers pipeline) or {CONFIG} (a transformer) in it"
            )
        index = read_index(path)
        names, pipeline = _transformers(index, path / INDEX)
        configs = [config if (config := path / name / CONFIG).is_file() else None for name in names]
        return _source(path, names, pipeline, configs, index)
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model}: no such file or folder, and no Hub id (OWNER/NAME)")
    return _on_hub(model)


def _transformers(index: Mapping[str, Any], path: Path) -> tuple[tuple[str, ...], str]:
    """Return the components of a pipeline that are diffusion transformers, and the pipeline's class."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelError(f"{path}: names no _class_name; expected a diffusers pipeline such as WanPipeline")
    parts = {
        name: part[1]
        for name, part in index.items()
        if isinstance(part, list) and len(part) == 2 and part[1] and (part[0] == "diffusers" or plugin_class(*part))
    }
    transformers: list[str] = []
    for name, part in parts.items():
        if "UNet" in part:
            raise ModelError(f"{path}: the {name} of a {pipeline} is a U-Net ({part}); only transformers are handled")
        if "Transformer" in part or find_family(part):
            transformer_class({"_class_name": part}, path)
            transformers.append(name)
    if not transformers:
        listed = ", ".join(f"{name} ({part})" for name, part in parts.items()) or "no part of diffusers"
        raise ModelError(
            f"{path}: a {pipeline} has no diffusion transformer, only {listed}; only transformers are handled"
        )
    return tuple(sorted(transformers, key=lambda name: (name != "transformer", name))), pipeline


def _on_hub(model: str) -> Source:
    index = _download(model, INDEX)
    if index is None:
        config = _download(model, CONFIG) or _download(model, f"transformer/{CONFIG}")
        if config is None:
            raise ModelError(f"{model}: has neither {INDEX} nor {CONFIG} on the Hub; expected a diffusers model")
        return Source(config=config)
    pipeline_index = read_index(index.parent)
    names, pipeline = _transformers(pipeline_index, Path(f"{model}/{INDEX}"))
    return _source(model, names, pipeline, [_download(model, f"{name}/{CONFIG}") for name in names], pipeline_index)


def _source(
    model: Path | str, names: tuple[str, ...], pipeline: str, configs: list[Path | None], index: Mapping[str, Any]
) -> Source:
    if configs[0] is None:
        raise ModelError(f"{model}/{names[0]}/{CONFIG}: no such file; {INDEX} of a {pipeline} names its folder")
    return Source(
        config=configs[0],
        pipeline=pipeline,
        others=names[1:],
        other_configs=tuple(configs[1:]),
        boundary_ratio=index.get("boundary_ratio"),
    )


def _download(model: str, name: str) -> Path | None:
    """Download one small file of a model on the Hub; None if the model has no such file."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    local = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    try:
        return Path(hf_hub_download(model, name, local_files_only=local, etag_timeout=SECONDS))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise ModelError(
            f"{model}: no such folder here, not downloaded before, and {why}; where there is a network, give "
            f"hf download {model} --include '*.json' --local-dir FOLDER, and here the path of that folder"
        ) from error
    except EntryNotFoundError:
        return None
    except GatedRepoError as error:
        raise ModelError(f"{model}: the Hub asks for a login with access to it; give hf auth login first") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{model}: no such folder here and no such model on the Hub (or a private one)") from error
    except HfHubHTTPError as error:
        raise ModelError(f"{model}: the Hub refuses {name}: {str(error).strip().partition(chr(10))[0]}") from error


def _reachable(endpoint: str) -> bool:
    """Tell whether anything answers there: the Hub's own client would retry for most of a minute."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=SECONDS):
            return True
    except HTTPError:
        return True
    except OSError:
        return False
