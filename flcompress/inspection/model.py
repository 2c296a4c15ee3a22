"""The blocks and sizes of a model, from its configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flcompress.diffusion.schedulers import NUM_TRAIN_TIMESTEPS
from flcompress.errors import FlcompressError, PreconditionError
from flcompress.ir.block import Block
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import choose
from flcompress.models.families.family import ClipSize
from flcompress.models.latent_size import usual_grid

if TYPE_CHECKING:
    from flcompress.models.source import Source

SHARES = (0.3, 0.5)
CHOICE = "the middle blocks, by parameters: there are no importance scores"
"""What the removals stand for."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The model after removing `share` of the parameters; `problem` says why it cannot be done."""

    share: float
    removed: tuple[str, ...] = ()
    blocks: int = 0
    parameters: int = 0
    flops: int | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Other:
    """A further transformer of the pipeline; None where its configuration is not there.

    `timesteps` are those that it answers, where it is one of two experts.
    """

    name: str
    timesteps: str
    model_class: str | None = None
    blocks: int | None = None
    parameters: int | None = None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The blocks and sizes of a model.

    Attributes:
        model: the model as the caller named it.
        graph: its FLOPs are those of `clip`; 0 if `unknown_flops` says why nothing was counted.
        clip: size in pixels and tokens; None if it has no meaning.
        latents: (frames, height, width); None likewise.
        timesteps: those that this transformer is called at, if it is one of two experts.
        others: further transformers of the pipeline.
    """

    model: str
    graph: BlockGraph
    clip: ClipSize | None
    latents: tuple[int, int, int] | None
    unknown_flops: str
    timesteps: str
    others: tuple[Other, ...]
    removals: tuple[Removal, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `flops` are null where they could not be counted."""
        graph, known = self.graph, not self.unknown_flops

        def figures(blocks: Sequence[Block]) -> dict[str, Any]:
            parameters = sum(block.parameters for block in blocks)
            flops = sum(block.flops for block in blocks)
            return {
                "parameters": parameters,
                "share": parameters / graph.parameters,
                "flops": flops if known else None,
                "flops_share": flops / graph.flops if known else None,
            }

        return {
            "model": self.model,
            "class": graph.model_class,
            "parameters": graph.parameters,
            "flops": graph.flops if known else None,
            "no_flops_because": self.unknown_flops,
            "clip": asdict(self.clip) if self.clip else None,
            "latents": list(self.latents) if self.latents else None,
            "timesteps": self.timesteps or None,
            "other_transformers": [asdict(other) for other in self.others],
            "stacks": [
                {
                    "path": stack,
                    "blocks": len(blocks),
                    "config_key": graph.config_keys.get(stack),
                    "kind": blocks[0].kind,
                    **figures(blocks),
                }
                for stack, blocks in graph.stacks.items()
            ],
            "blocks": [
                {
                    "path": block.path,
                    "stack": block.stack,
                    "kind": block.kind,
                    **figures([block]),
                    "streams": [str(stream) for stream in block.streams],
                    "removable": block.removable,
                    "reason": block.reason,
                }
                for block in graph.blocks
            ],
            "edges": sorted([source, target] for source, target in graph.flows),
            "removals_choose": CHOICE,
            "removals": [asdict(removal) for removal in self.removals],
        }


def inspect_model(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    tokens: int | None = None,
) -> Inspection:
    """Return the blocks of a model's transformer, their parameters and FLOPs, and what removals would leave.

    Args:
        model: pipeline folder, transformer folder, `config.json`, or Hub id (only configurations are downloaded).
        height: clip height in pixels. Default, here and in the next three: the family's usual one.
        width: clip width in pixels.
        frames: frames of the clip.
        tokens: length of the prompt.

    Raises:
        ModelError: nothing that can be inspected.
        RequestError: a size that the model cannot make.
    """
    from flcompress.models.loading import meta_transformer
    from flcompress.models.source import find_source

    source = find_source(model)
    transformer = meta_transformer(source.config)
    name = type(transformer).__name__
    known = usual_grid(name, transformer.config)
    clip, latents = None, None
    if known is not None:
        overrides = {"height": height, "width": width, "frames": frames, "tokens": tokens}
        grid, usual = known
        clip = replace(usual, **{key: value for key, value in overrides.items() if value is not None})
        latents = grid.latents(clip.frames, clip.height, clip.width, ("--frames", "--height", "--width"))
    graph, problem = _graph(transformer, clip, latents)
    return Inspection(
        model=model,
        graph=graph,
        clip=clip,
        latents=latents,
        unknown_flops=problem,
        timesteps=_timesteps(source.boundary_ratio, 0),
        others=_others(source),
        removals=tuple(_removal(graph, share, counted=not problem) for share in SHARES),
    )


def _others(source: Source) -> tuple[Other, ...]:
    from flcompress.models.loading import meta_transformer
    from flcompress.tracing.counting import listed_blocks

    others = []
    for number, (name, config) in enumerate(zip(source.others, source.other_configs, strict=True), start=1):
        other = Other(name=name, timesteps=_timesteps(source.boundary_ratio, number))
        if config is not None:
            graph = listed_blocks(meta_transformer(config))
            other = replace(other, model_class=graph.model_class, blocks=len(graph.blocks), parameters=graph.parameters)
        others.append(other)
    return tuple(others)


def _timesteps(boundary_ratio: float | None, number: int) -> str:
    """Return the timesteps of the pipeline's transformer number `number`; "" if it does not share them."""
    if boundary_ratio is None or number > 1:
        return ""
    return f"{'below' if number else 'from'} {boundary_ratio * NUM_TRAIN_TIMESTEPS:g}"


def _graph(transformer: Any, clip: ClipSize | None, latents: tuple[int, int, int] | None) -> tuple[BlockGraph, str]:
    """The block graph with the FLOPs of the clip; where the class cannot be run, its lists of blocks, and why."""
    from flcompress.models.inputs import example_inputs
    from flcompress.tracing.counting import graph_at, listed_blocks

    name = type(transformer).__name__
    if clip is None or latents is None:
        return listed_blocks(transformer), f"no example inputs are known for {name}, so it was not run"
    inputs = example_inputs(transformer, latent_shape=latents, tokens=clip.tokens)
    try:
        return graph_at(transformer, inputs), ""
    except FlcompressError as error:
        return listed_blocks(transformer), str(error)


def _removal(graph: BlockGraph, share: float, *, counted: bool) -> Removal:
    try:
        removed = choose(graph, share, "middle")
    except PreconditionError as error:
        return Removal(share=share, problem=str(error))
    gone = [graph.block(path) for path in removed]
    return Removal(
        share=share,
        removed=removed,
        blocks=len(graph.blocks) - len(gone),
        parameters=graph.parameters - sum(block.parameters for block in gone),
        flops=graph.flops - sum(block.flops for block in gone) if counted else None,
    )
