"""The parts of a pipeline other than its transformer, run by the stock pipeline's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flcompress.errors import ModelError
from flcompress.models.configs import check_transformer_config, read_index, read_json
from flcompress.models.families import family_of
from flcompress.models.part_check import check_loaded, check_part, load_tables
from flcompress.models.shards import folder_tensors
from flcompress.models.stock import no_progress_bars, quiet_loading, stock_class
from flcompress.models.stock_files import stock_files
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.models.video import decode_latents, encode_clips, make_room

NOT_HERE = ("transformer", "transformer_2", "scheduler")


class Parts:
    """Text encoders, tokenizers and autoencoder of one pipeline; each is loaded when it is first used.

    Only the configuration of the transformer is read.

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
        """The stock pipeline with all but the transformers and, unless needed, the autoencoder."""
        loaded = {name: self._loaded(name) for name in self.folders if name != "vae"}
        vae = self.vae if self.family.needs_vae(self._index["_class_name"]) else None
        missing = {name: None for name in self._index if _is_part(self._index[name]) and name not in loaded}
        options = {
            name: value for name, value in self._index.items() if not name.startswith("_") and not _is_part(value)
        }
        factory = self.family.model_class(self._index["_class_name"])
        return factory(**{**missing, **loaded, **options, "vae": vae})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int) -> dict[str, torch.Tensor]:
        """Return the conditioning of prompts, [prompts, ...] each, as the stock pipeline makes it."""
        with no_progress_bars():
            self._check_tokens(prompts)
            return _floats(self.family.encode_prompts(self._pipeline, self.config, prompts, max_sequence_length))

    def encode_clips(self, clips: torch.Tensor) -> torch.Tensor:
        """Return the latents of clips [n, 3, frames, height, width] in [-1, 1]."""
        latents = encode_clips(self.vae, clips.to(self._device))
        return torch.cat([latents[:, :, :1]] * self._padding + [latents], dim=2)

    @torch.no_grad()
    def encode_images(
        self, clips: torch.Tensor, prompts: Sequence[str], max_sequence_length: int
    ) -> dict[str, torch.Tensor]:
        """Return the conditioning by the first frames of clips [n, 3, frames, height, width] in [-1, 1].

        It overrides that by the clips' prompts alone; nothing for pipelines that start from text.
        """
        if not self.from_image:
            return {}
        clips = clips.to(self._device)
        make_room(self.vae, clips, "encode")  # some pipelines encode a clip of the same size that holds the frame alone
        with no_progress_bars():
            pipeline = self._pipeline
            return _floats(self.family.image_conditioning(pipeline, self.config, clips, prompts, max_sequence_length))

    def let_go(self) -> None:
        """Free what is loaded; each part is loaded again when it is next used."""
        for name in ("vae", "_pipeline"):
            vars(self).pop(name, None)
        free_gpu_memory()

    @property
    def from_image(self) -> bool:
        """True if the pipeline makes a clip from its first frame."""
        return self._index["_class_name"] in self.family.from_image

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return clips [n, 3, frames, height, width] in [-1, 1], of the frames that the stock pipeline shows."""
        clips = decode_latents(self.vae, latents[:, :, self._padding :].to(self._device))
        return clips[:, :, self.family.cut_frames(self.config) :]

    def _check_tokens(self, prompts: Sequence[str]) -> None:
        """Raise ModelError if a tokenizer gives a token for which its text encoder has no embedding."""
        for name in self.folders:
            encoder = getattr(self._pipeline, name.replace("tokenizer", "text_encoder"), None)
            if not name.startswith("tokenizer") or encoder is None:
                continue
            rows = encoder.get_input_embeddings().num_embeddings
            tokens = getattr(self._pipeline, name)(list(prompts), verbose=False).input_ids
            if (largest := max((token for row in tokens for token in row), default=0)) >= rows:
                raise ModelError(
                    f"{self.folders[name]}: gives the token {largest} for a prompt, the text encoder knows {rows:,}; "
                    "the two are not of one model, copy both again"
                )

    @property
    def _padding(self) -> int:
        """Latent frames before the first, so that the transformer's patches divide them."""
        return self.family.patch(self.config)[0] - 1

    @no_progress_bars()
    def _loaded(self, name: str, dtype: torch.dtype | None = None) -> Any:
        return load_part(self.folders[name], self._index[name], self._device, dtype)


def open_parts(folder: Path, device: str = "cpu") -> Parts:
    """Return the parts of a pipeline folder."""
    index = read_index(folder)
    return Parts(index, {name: folder / name for name in ("transformer", *part_names(index))}, device)


def part_names(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the components in `model_index.json` that have a folder, transformers and scheduler aside."""
    return tuple(name for name, value in index.items() if _is_part(value) and value[0] and name not in NOT_HERE)


def load_part(folder: Path, kind: Sequence[str], device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Load a component by its stock class, in evaluation mode, without gradients; safetensors only.

    Args:
        folder: the component's.
        kind: (library, class name), as `model_index.json` has it.
        device: where it is put.
        dtype: of its weights; as stock loading has it where None.

    Raises:
        ModelError: a class that is not known, or files that are not those of a whole part; see `check_part`.
    """
    factory = stock_class(folder, kind)
    if not issubclass(factory, torch.nn.Module):
        return load_tables(folder, factory)
    check_part(folder, kind)
    options: dict[str, Any] = {"variant": stock_files(folder).variant, "output_loading_info": True}
    options |= _computed_in(folder, kind[0]) if dtype is None else {"torch_dtype": dtype}
    with quiet_loading():
        loaded, info = factory.from_pretrained(str(folder), use_safetensors=True, **options)
    check_loaded(folder, info)
    return loaded.eval().requires_grad_(False).to(device)


def _computed_in(folder: Path, library: str) -> dict[str, Any]:
    """Return the option of fp32 for a text encoder stored in fp8 whose configuration names no other type.

    Fp8 is no type to compute in; every other type is stock loading's own choice.
    """
    if library != "transformers":
        return {}
    config = read_json(folder / "config.json", "a transformers model folder has one")
    named = str(config.get("dtype") or config.get("torch_dtype") or "float8")
    stored = any(tensor.dtype.startswith("F8") for tensor in folder_tensors(folder).values())
    return {"dtype": torch.float32} if stored and "float8" in named else {}


def _floats(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, floating ones in fp32."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _is_part(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2
