"""The parts of a pipeline beside its transformer, run by the stock pipeline's own code."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.families import family_of
from flcompress.models.folder import check_transformer_config, read_json
from flcompress.models.garbage import free_gpu_memory
from flcompress.models.quiet import no_progress_bars
from flcompress.models.tiling import make_room
from flcompress.models.video import decode_latents, encode_clips

LIBRARIES = ("diffusers", "transformers")
"""A part of any other library would be code from the model folder, which is never run."""

NOT_HERE = ("transformer", "transformer_2", "scheduler")


class Parts:
    """Text encoders, tokenizers and autoencoder of one pipeline; each is loaded when it is first used.

    Of the transformer only the configuration is read.

    Args:
        index: the folder's `model_index.json`.
        components: component name -> folder; it may point into several places.
        device: where they run.
        autoencoder: its dtype; that of its files where None.

    Attributes:
        family: what tracing cannot find out about the model.
        folders: component name -> folder, of the parts alone.
    """

    def __init__(
        self,
        index: Mapping[str, Any],
        components: Mapping[str, Path],
        device: str = "cpu",
        autoencoder: torch.dtype | None = None,
    ) -> None:
        self._index, self._device, self._autoencoder = index, device, autoencoder
        self.family = family_of(index["_class_name"])
        self.folders = {name: components[name] for name in part_names(index)}
        self._transformer = components["transformer"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's configuration."""
        return check_transformer_config(self._transformer)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder, in evaluation mode, without gradients."""
        return self._loaded("vae", self._autoencoder)

    @cached_property
    def _pipeline(self) -> Any:
        """The stock pipeline with all but the transformers and the autoencoder."""
        import diffusers

        found = {name: self._loaded(name) for name in self.folders if name != "vae"}
        vae = self.vae if self._index["_class_name"] in NEED_VAE else None
        missing = {name: None for name in self._index if _is_part(self._index[name]) and name not in found}
        options = {name: one for name, one in self._index.items() if not name.startswith("_") and not _is_part(one)}
        factory = getattr(diffusers, self._index["_class_name"])
        return factory(**{**missing, **found, **options, "vae": vae})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> dict[str, torch.Tensor]:
        """Conditioning of prompts, [prompts, ...] each, as the stock pipeline makes it."""
        with no_progress_bars():
            return _floats(self.family.encode_prompts(self._pipeline, self.config, prompts, max_sequence_length))

    def encode_clips(self, clips: torch.Tensor) -> torch.Tensor:
        """Latents of clips [n, 3, frames, height, width] in [-1, 1]."""
        latents = encode_clips(self.vae, clips.to(self._device))
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def encode_images(
        self, clips: torch.Tensor, prompts: Sequence[str], max_sequence_length: int
    ) -> dict[str, torch.Tensor]:
        """Conditioning by the first frames of clips [n, 3, frames, height, width] in [-1, 1].

        It goes before that by the clips' prompts alone; nothing for pipelines that start from text.
        """
        if not self.from_image:
            return {}
        clips = clips.to(self._device)
        make_room(self.vae, clips, "encode")  # some pipelines encode a clip of the same size that holds the frame alone
        with no_progress_bars():
            pipeline = self._pipeline
            return _floats(self.family.image_conditioning(pipeline, self.config, clips, prompts, max_sequence_length))

    def let_go(self) -> None:
        """Drop what is loaded, for something else to take its memory; each is loaded again when it is next used."""
        for name in ("vae", "_pipeline"):
            vars(self).pop(name, None)
        free_gpu_memory()

    @property
    def from_image(self) -> bool:
        """Whether the pipeline makes a clip from its first frame."""
        return self._index["_class_name"] in self.family.from_image

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Clips [n, 3, frames, height, width] in [-1, 1], of the frames that the stock pipeline shows."""
        clips = decode_latents(self.vae, latents[:, :, self._padding :].to(self._device))
        return clips[:, :, self.family.cut_frames(self.config) :]

    @property
    def _padding(self) -> int:
        """Latent frames before the first, so that the transformer's patches divide them."""
        return self.family.patch(self.config)[0] - 1

    @no_progress_bars()
    def _loaded(self, name: str, dtype: torch.dtype | None = None) -> Any:
        return load_part(self.folders[name], self._index[name], self._device, dtype)


NEED_VAE = (
    "WanImageToVideoPipeline",
    "LTXPipeline",
    "CogVideoXImageToVideoPipeline",
    "HunyuanVideoImageToVideoPipeline",
)
"""Pipelines that ask the autoencoder for more than its code of a clip: a condition, compression ratios."""


def open_parts(folder: Path, device: str = "cpu") -> Parts:
    """The parts of a pipeline folder."""
    index = read_json(folder / "model_index.json", "a diffusers pipeline folder has one")
    return Parts(index, {name: folder / name for name in ("transformer", *part_names(index))}, device)


def part_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Components that `model_index.json` names and that have a folder, transformers and scheduler aside."""
    return tuple(name for name, one in index.items() if _is_part(one) and one[0] and name not in NOT_HERE)


def load_part(folder: Path, kind: Sequence[str], device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A component by its stock class, in evaluation mode, without gradients; safetensors only.

    Args:
        folder: the component's.
        kind: (library, class name), as `model_index.json` has it.
        device: where it is put.
        dtype: of its weights; as stock loading has it where None.

    Raises:
        ModelError: a library other than diffusers and transformers, or a class it does not have.
    """
    library, name = kind
    if library not in LIBRARIES:
        raise ModelError(
            f"{folder.parent / 'model_index.json'}: {folder.name} is of library {library!r}, expected "
            f"{' or '.join(LIBRARIES)}; code of a model folder is not run"
        )
    factory = getattr(importlib.import_module(library), name, None)
    if factory is None:
        raise ModelError(
            f"{folder.parent / 'model_index.json'}: {folder.name} is a {name}, which this {library} does not have; "
            "install the version the model was saved with"
        )
    if not issubclass(factory, torch.nn.Module):
        return factory.from_pretrained(str(folder))
    kept = {} if dtype is None else {"torch_dtype": dtype}
    return factory.from_pretrained(str(folder), use_safetensors=True, **kept).eval().requires_grad_(False).to(device)


def _floats(made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, floating ones in fp32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in made.items()}


def _is_part(one: Any) -> bool:
    return isinstance(one, list | tuple) and len(one) == 2
