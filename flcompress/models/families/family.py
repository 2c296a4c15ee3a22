"""The interface of a model family: what tracing cannot find out about its transformers and pipelines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from flcompress.diffusion.network import Conditioning
from flcompress.models.families.unmasked import MaskSwitch

Config = Mapping[str, Any]
"""The configuration of a transformer, an autoencoder, a scheduler or a pipeline."""

LatentShape = tuple[int, int, int]
"""(frames, height, width) of latents."""

Compression = tuple[int, int]
"""(frames, pixels each way) that one latent of an autoencoder stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSize:
    """Height and width in pixels, frames (1 for an image), and the length of the prompt in tokens."""

    height: int
    width: int
    frames: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class OriginalNames:
    """Names that a family's own project gives to the modules of its transformer, which most LoRAs use.

    "a + b" is a layer whose rows are those of a and b, in this order; "a | b" is whichever of the two a block has.

    Attributes:
        stacks: list of blocks in the original code -> that of the stock class, with the same numbers.
        modules: module in the original code -> in the stock class: within a block, or in the whole model.
    """

    stacks: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TokenAxes:
    """Where a transformer's forward has the clip's tokens, so that processes can share them.

    Attributes:
        heads: heads of its attention, which the processes divide.
        arguments: argument of the forward -> axis of the tokens in its tensors; those with fewer axes have no tokens.
        outputs: module -> axis of the tokens in the tensors that it returns.
        grid: module that returns [n, channels, frames, rows, columns], which the forward flattens to tokens.
        joined: module that returns the text's tokens, as many as its first argument has, and then the clip's.
        last: module that returns the last tokens, [n, tokens, channels].
    """

    heads: int
    arguments: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    grid: str | None = None
    joined: str | None = None
    last: str = "proj_out"


class Family(ABC):
    """A model family, stateless. Latents are [n, channels, frames, height, width] everywhere; an image has one frame.

    A subclass names its classes and writes `arguments`, `example_conditioning` and `encode_prompts`; every other method
    has a default, which fits a flow model of images or clips whose pipeline does nothing unusual.

    Attributes:
        name: the name in the documentation.
        pipelines: pipeline classes.
        from_image: those of them that make a clip from its first frame.
        transformers: transformer classes.
        masks_attention: whether its attention is given masks.
        ignores_padding: whether no result depends on the embeddings after the last token that the prompt's mask shows.
        prompt_names: entries of the conditioning that the prompt decides; others come from a first frame.
        embedded_guidance: the usual scale of a guidance-distilled network; None where the family has none.
        image: whether its latents always have one frame.
        attends_to_text: whether one attention runs over the tokens of latents and text together.
        text_first: whether the text's tokens come first in that attention.
        text_stacks: lists of blocks that see the text alone.
        self_attention: the module, within a block, in which the latents' tokens attend to one another.
        fp32_arguments: forward arguments that no precision rounds: bf16 makes 6016 of a timestep of 6000.
        original: the module names of the family's own project, where they differ from the stock class's.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    from_image: ClassVar[tuple[str, ...]] = ()
    transformers: ClassVar[tuple[str, ...]]
    masks_attention: ClassVar[bool] = False
    ignores_padding: ClassVar[bool] = False
    prompt_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    embedded_guidance: ClassVar[float | None] = None
    image: ClassVar[bool] = False
    attends_to_text: ClassVar[bool] = True
    text_first: ClassVar[bool] = False
    text_stacks: ClassVar[tuple[str, ...]] = ()
    self_attention: ClassVar[str] = "attn1"
    fp32_arguments: ClassVar[tuple[str, ...]] = ("timestep", "guidance")
    original: ClassVar[OriginalNames] = OriginalNames()

    # The call of the transformer.

    @abstractmethod
    def arguments(
        self,
        config: Config,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        """Return the keyword arguments of the transformer's forward.

        Args:
            config: the transformer's.
            x: noised latents.
            timestep: [n], 0 to 1000, 1000 being pure noise; each family scales or turns it as its pipeline does.
            conditioning: conditioning on the prompt and, for `from_image`, of the first frame.
            guidance: embedded guidance scale; the family's usual one where None.
        """

    def prediction(
        self, config: Config, output: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> torch.Tensor:
        """Return the forward's output as the process predicts it (velocity e - x0 for flow models), shaped as x."""
        return output

    def mask_switch(self, transformer: Any) -> MaskSwitch | None:
        """Return what lets a transformer's attention leave out its mask; None if it has none or cannot.

        The same object at every call; the first may change the transformer, in place, without changing its results.
        """
        return None

    def patch(self, config: Config) -> tuple[int, int]:
        """Return (frames, rows or columns) of latents that one token stands for."""
        size = config.get("patch_size") or 1
        if isinstance(size, list | tuple):
            return int(size[0]), int(size[-1])
        return int(config.get("patch_size_t") or 1), int(size)

    def token_grid(self, config: Config, shape: LatentShape) -> LatentShape:
        """Return (frames, rows, columns) of the tokens of latents, which the transformer has in this order."""
        over_time, over_space = self.patch(config)
        return shape[0] // over_time, shape[1] // over_space, shape[2] // over_space

    def token_axes(self, config: Config) -> TokenAxes | None:
        """Return where the tokens of a clip can be split over processes; None if this transformer's cannot."""
        return None

    def channels(self, config: Config) -> int:
        """Return the channels of the latents."""
        return int(config["in_channels"])

    # Conditioning.

    @abstractmethod
    def example_conditioning(
        self, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Draw random conditioning for tracing and certificates, with every optional input that the model uses."""

    def call_conditioning(
        self, index: Config, config: Config, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """Draw random conditioning as a call of the pipeline in `index` (`model_index.json`) would make it."""
        return self.example_conditioning(config, batch, shape, tokens, draw)

    @abstractmethod
    def encode_prompts(
        self, pipeline: Any, config: Config, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        """Return the conditioning of prompts by the pipeline's own code; tokens padded to `length`."""

    def image_conditioning(
        self, pipeline: Any, config: Config, clips: torch.Tensor, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        """Return the conditioning by the first frame, for `from_image`; it overrides that by the prompt alone.

        Args:
            pipeline: the stock one, without its transformers' weights.
            config: the transformer's.
            clips: [n, 3, frames, height, width] in [-1, 1].
            prompts: the clips' own.
            length: tokens a prompt is padded to.
        """
        raise NotImplementedError(f"{self.name} has no pipeline that starts from an image")

    def image_condition(self, config: Config) -> str | None:
        """Return what, besides the pipeline and its parts, decides how a first frame conditions; None if nothing."""
        return None

    # Sampling.

    def call(self, guidance_scale: float, embedded: float | None, negative_prompt: str = "") -> dict[str, float | str]:
        """Return the guidance arguments of the stock pipeline's call."""
        return {"guidance_scale": guidance_scale, **({"negative_prompt": negative_prompt} if negative_prompt else {})}

    def noise(self, shape: Sequence[int], draw: torch.Generator) -> torch.Tensor:
        """Draw starting noise [1, *shape] with the numbers that the stock pipeline draws from the same generator."""
        return torch.randn(1, *shape, generator=draw)

    def start(self, noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the latents that sampling starts from; noise alone in most pipelines."""
        return noise

    def end(self, config: Config, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """Return the final latents: a given first frame as it was given, without rounding."""
        return x

    def sigmas(self, steps: int, scheduler: Config) -> Sequence[float] | None:
        """Return what the stock pipeline passes to a scheduler of this configuration; None if that spaces its own."""
        return None

    def sequence_length(self, config: Config, shape: LatentShape) -> int | None:
        """Return the tokens that the stock pipeline counts for dynamic shifting; None if it counts none."""
        return None

    def mu(self, scheduler: Config, config: Config, shape: LatentShape) -> float | None:
        """Return what the stock pipeline passes to a scheduler with dynamic shifting: linear in the tokens."""
        tokens = self.sequence_length(config, shape)
        if tokens is None or not scheduler.get("use_dynamic_shifting"):
            return None
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        base, top = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        slope = (top - base) / (high - low)
        return float(tokens * slope + base - slope * low)

    # Clips and their latents.

    def frame_rate(self, index: Config, config: Config) -> float:
        """Return the frames per second of its clips; 1 for an image, whose frame is shown for a second.

        Args:
            index: the pipeline's `model_index.json`.
            config: the transformer's.
        """
        if self.image:
            return 1.0
        raise NotImplementedError(f"{self.name} has no frame rate")

    def compression(self, autoencoder: Config) -> Compression:
        """Return (frames, pixels each way) that one latent stands for, from the autoencoder's configuration."""
        space = 2 ** (len(autoencoder["block_out_channels"]) - 1)
        return int(autoencoder.get("temporal_compression_ratio") or 1), space

    def usual(self, config: Config) -> tuple[Compression, ClipSize] | None:
        """Return the usual autoencoder's compression and the pipeline's default size; None where there is none."""
        return None

    def fixed_latents(self, config: Config) -> LatentShape | None:
        """Return the size that learned positions are for; None if positions are computed."""
        return None

    def small_positions(self, config: Config) -> dict[str, Any]:
        """Return the config changes with which a model of fixed size takes the usual small example inputs."""
        return {}

    def cut_frames(self, config: Config) -> int:
        """Return how many of the first decoded frames the stock pipeline does not show."""
        return 0

    def needs_vae(self, pipeline: str) -> bool:
        """Tell whether that pipeline class asks the autoencoder for more than its code of a clip (a condition, say)."""
        return pipeline in self.from_image

    # Classes.

    def model_class(self, name: str) -> Any:
        """Return the class of a name in `pipelines` or `transformers`: that of diffusers, unless overridden.

        A family with classes of its own returns them here. `from_pretrained` of diffusers loads such a transformer only
        if the module that defines it also has the name `ModelMixin`.
        """
        import diffusers

        return getattr(diffusers, name, None)

    def module_of(self, name: str) -> str:
        """Return the module that a user imports one of its classes from."""
        module: str = self.model_class(name).__module__
        return "diffusers" if module.partition(".")[0] == "diffusers" else module

    # Exports of the denoiser.

    def check_export(self, config: Config, tokens: int) -> None:  # noqa: B027 (nothing to do for most families)
        """Check that an exported forward is right for prompts of `tokens` tokens.

        Raises:
            RequestError: it is not; names the setting.
        """

    def export_arguments(self, config: Config, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return `arguments` with tensors in place of sizes, so that one graph takes any size.

        A number becomes part of an exported graph, a tensor is an input of it.
        """
        return dict(arguments)

    def take_export_arguments(self, transformer: Any) -> None:  # noqa: B027 (nothing to do for most families)
        """Change a transformer, in place, so that its forward takes `export_arguments`, if it does not already."""

    def prepare_export(self, transformer: Any) -> None:  # noqa: B027 (nothing to do for most families)
        """Rewrite modules, in place, whose forward torch.export would fix to one size; the numbers stay."""
