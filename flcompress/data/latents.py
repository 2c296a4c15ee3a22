"""Clips and captions as a network sees them: normalised latents and prompt embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flcompress.errors import DataError

_TENSORS = ("latents", "prompt_index", "prompt_embeds", "negative_embeds")


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """Encoded clips. Each distinct caption is embedded once.

    Attributes:
        latents: [n, channels, frames, height, width], unit scale.
        prompt_index: [n] caption of each clip.
        prompt_embeds: [captions, tokens, channels].
        negative_embeds: [tokens, channels] of the empty prompt.
        captions: the texts.
    """

    latents: torch.Tensor
    prompt_index: torch.Tensor
    prompt_embeds: torch.Tensor
    negative_embeds: torch.Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` clips drawn with replacement: latents [n, ...] and their prompt embeddings [n, tokens, channels]."""
        chosen = torch.randint(len(self), (n,), generator=generator)
        return self.latents[chosen], self.prompt_embeds[self.prompt_index[chosen]]

    def split(self, heldout: int) -> tuple[LatentDataset, LatentDataset]:
        """(training part, the last `heldout` clips): monitors must not be read off the clips that are trained on."""
        if not 0 < heldout < len(self):
            raise DataError(f"data: {len(self)} clips given, expected more than the {heldout} that monitors hold out")
        return self._part(slice(0, -heldout)), self._part(slice(-heldout, None))

    def _part(self, chosen: slice) -> LatentDataset:
        return LatentDataset(
            self.latents[chosen], self.prompt_index[chosen], self.prompt_embeds, self.negative_embeds, self.captions
        )

    def save(self, folder: Path) -> None:
        """Write `latents.safetensors` and `captions.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).contiguous() for name in _TENSORS}, str(folder / "latents.safetensors"))
        (folder / "captions.json").write_text(json.dumps(list(self.captions), indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> LatentDataset:
        """Read what `save` wrote.

        Raises:
            DataError: missing, damaged, not finite, or empty.
        """
        path = folder / "latents.safetensors"
        try:
            tensors = load_file(str(path))
            captions = tuple(json.loads((folder / "captions.json").read_text(encoding="utf-8")))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise DataError(
                f"{folder}: not a latent dataset ({error}); expected latents.safetensors and captions.json"
            ) from error
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise DataError(f"{path}: no tensor {missing[0]}; expected {', '.join(_TENSORS)}")
        made = cls(captions=captions, **{name: tensors[name] for name in _TENSORS})
        made.check(str(path))
        return made

    def check(self, where: str) -> None:
        """Raise DataError, naming `where`, unless there are clips and all numbers are finite."""
        if len(self) == 0:
            raise DataError(f"{where}: no clips; expected at least one")
        if not bool(torch.isfinite(self.latents).all()):
            raise DataError(f"{where}: latents hold values that are not finite; encode the clips again")
        if int(self.prompt_index.max()) >= len(self.prompt_embeds):
            raise DataError(
                f"{where}: prompt_index names caption {int(self.prompt_index.max())} of "
                f"{len(self.prompt_embeds)}; encode the clips again"
            )
