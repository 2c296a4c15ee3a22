"""Clips and captions as a network sees them: unit-scale latents and conditioning."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flcompress.diffusion.conditioning import Conditioning, taken
from flcompress.errors import DataError

_PROMPTS, _NEGATIVE, _CLIPS = "prompts.", "negative.", "clips."
"""Prefixes of the conditioning's tensors in a file."""


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """Encoded clips. Each distinct caption is embedded once.

    Attributes:
        latents: [n, channels, frames, height, width], unit scale.
        prompt_index: [n] caption of each clip.
        prompts: conditioning by each caption, [captions, ...].
        negative: conditioning by the empty prompt, [1, ...].
        captions: the texts.
        clips: conditioning by each clip itself (its first frame), [n, ...]; empty for most models.
    """

    latents: torch.Tensor
    prompt_index: torch.Tensor
    prompts: Conditioning
    negative: Conditioning
    captions: tuple[str, ...]
    clips: Conditioning = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`n` clips drawn with replacement: latents [n, ...] and their conditioning."""
        chosen = torch.randint(len(self), (n,), generator=generator)
        return self.latents[chosen], taken(self.prompts, self.prompt_index[chosen]) | taken(self.clips, chosen)

    def split(self, heldout: int) -> tuple[LatentDataset, LatentDataset]:
        """(training part, the last `heldout` clips): monitors must not be read off the clips that are trained on."""
        if not 0 < heldout < len(self):
            raise DataError(f"data: {len(self)} clips given, expected more than the {heldout} that monitors hold out")
        return self._part(slice(0, -heldout)), self._part(slice(-heldout, None))

    def _part(self, chosen: slice) -> LatentDataset:
        return replace(
            self,
            latents=self.latents[chosen],
            prompt_index=self.prompt_index[chosen],
            clips=taken(self.clips, chosen),
        )

    def save(self, folder: Path) -> None:
        """Write `latents.safetensors` and `captions.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"latents": self.latents, "prompt_index": self.prompt_index}
        for prefix, given in ((_PROMPTS, self.prompts), (_NEGATIVE, self.negative), (_CLIPS, self.clips)):
            tensors |= {f"{prefix}{name}": tensor for name, tensor in given.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "latents.safetensors"))
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

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}

        prompts, negative = part(_PROMPTS), part(_NEGATIVE)
        for wanted, found in (
            ("latents", "latents" in tensors),
            ("prompt_index", "prompt_index" in tensors),
            (f"{_PROMPTS}*", prompts),
            (f"{_NEGATIVE}*", set(negative) == set(prompts)),
        ):
            if not found:
                raise DataError(f"{path}: no tensor {wanted}; encode the clips again")
        made = cls(tensors["latents"], tensors["prompt_index"], prompts, negative, captions, part(_CLIPS))
        made.check(str(path))
        return made

    def check(self, where: str) -> None:
        """Raise DataError, naming `where`, unless there are clips and all numbers are finite."""
        if len(self) == 0:
            raise DataError(f"{where}: no clips; expected at least one")
        if not bool(torch.isfinite(self.latents).all()):
            raise DataError(f"{where}: latents hold values that are not finite; encode the clips again")
        known = min(map(len, self.prompts.values()))
        if int(self.prompt_index.max()) >= known:
            raise DataError(
                f"{where}: prompt_index names caption {int(self.prompt_index.max())} of {known}; encode the clips again"
            )
