"""Which tensors a program's denoiser takes, and which call of a stock pipeline leads to them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flcompress.errors import PostconditionError
from flcompress.ir.graph import INPUT
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
    """The shapes the program was traced with.

    Raises:
        PostconditionError: no edge of its graph leads from the latents.
    """
    flows = (flow for (source, _), tensors in program.graph.flows.items() if source == INPUT for flow in tensors)
    for flow in flows:
        if flow.source == "hidden_states" and len(flow.spec.shape) == 5:
            _, channels, frames, height, width = flow.spec.shape
            config = check_transformer_config(program.components["transformer"])
            return Shapes(
                latents=(channels, frames, height, width),
                text=(program.contract.max_sequence_length, int(config["text_dim"])),
            )
    raise PostconditionError(
        f"block graph of {program.graph.model_class}: no edge from input hidden_states [batch, channels, frames, "
        "height, width]; trace it with video latents"
    )


def clip_of(program: Program, shapes: Shapes) -> Clip:
    """Clip size by the autoencoder's scale factors; its first frame is coded alone (81 frames are 21 of latents)."""
    config = read_json(program.components["vae"] / "config.json", "a diffusers autoencoder has one")
    space, time = int(config["scale_factor_spatial"]), int(config["scale_factor_temporal"])
    _, frames, height, width = shapes.latents
    return Clip(height=height * space, width=width * space, num_frames=(frames - 1) * time + 1)


def _described(tensors: dict[str, list[Any]]) -> list[dict[str, object]]:
    return [{"name": name, "shape": shape, "dtype": "float32"} for name, shape in tensors.items()]
