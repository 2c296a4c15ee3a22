"""Which tensors a program's denoiser takes, and which call of a stock pipeline leads to them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flcompress.models.compression import clip_size
from flcompress.models.folder import check_transformer_config, read_json
from flcompress.pipeline.program import Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """Shapes without their batch axis.

    Attributes:
        latents: channels, frames, height, width.
        text: tokens, channels.
    """

    latents: tuple[int, int, int, int]
    text: tuple[int, int]

    def bindings(self) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        """Inputs and outputs of the denoiser, as a manifest states them."""
        latents, text = list(self.latents), list(self.text)
        inputs: dict[str, list[Any]] = {
            "hidden_states": ["batch", *latents],
            "timestep": ["batch"],
            "encoder_hidden_states": ["batch", *text],
        }
        outputs: dict[str, list[Any]] = {"velocity": ["batch", *latents]}
        return _described(inputs), _described(outputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Size of the clips that a program's autoencoder makes of its latents, in pixels and frames."""

    height: int
    width: int
    num_frames: int

    def arguments(self) -> dict[str, int]:
        return asdict(self)


def shapes_of(program: Program) -> Shapes:
    """The shapes the program is sampled with."""
    config = check_transformer_config(program.components["transformer"])
    return Shapes(latents=program.latents, text=(program.contract.max_sequence_length, int(config["text_dim"])))


def clip_of(program: Program) -> Clip:
    """Size of the clip that the program's latents decode to."""
    config = read_json(program.components["vae"] / "config.json", "a diffusers autoencoder has one")
    frames, height, width = clip_size(config, program.latents[1:])
    return Clip(height=height, width=width, num_frames=frames)


def _described(tensors: dict[str, list[Any]]) -> list[dict[str, object]]:
    return [{"name": name, "shape": shape, "dtype": "float32"} for name, shape in tensors.items()]
