"""What a model is made of, from its configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flcompress.ir.graph import BlockGraph
from flcompress.pipeline.start import trace_folder

SHARES = (0.3, 0.5)
TOKENS = 512


def inspect_model(path: Path, tokens: int = TOKENS) -> dict[str, Any]:
    """Blocks of a pipeline folder or transformer folder, and what removals would leave; plain data.

    Raises:
        ModelError: neither.
    """
    from flcompress.models.folder import check_pipeline, check_transformer_config

    if (path / "config.json").is_file():
        transformer = path
        check_transformer_config(path)
    else:
        check_pipeline(path, weights=False)
        transformer = path / "transformer"
    graph = trace_folder(transformer, tokens)
    return {
        "model": str(path),
        "class": graph.model_class,
        "parameters": graph.parameters,
        "flops": graph.flops,
        "tokens": tokens,
        "blocks": [
            {
                "path": block.path,
                "stack": block.stack,
                "kind": block.kind,
                "parameters": block.parameters,
                "share": block.parameters / graph.parameters,
                "flops": block.flops,
            }
            for block in graph.blocks
        ],
        "removals": [_removal(graph, share) for share in SHARES],
    }


def inspection_text(found: dict[str, Any]) -> str:
    """What `inspect_model` found, as text for people."""
    width = max(len(block["path"]) for block in found["blocks"])
    lines = [
        f"{found['model']}: {found['class']}, {len(found['blocks'])} blocks, {found['parameters']:,} parameters, "
        f"{found['flops']:,} FLOPs/forward at {found['tokens']} tokens",
        *(
            f"  {block['path']:<{width}}  {block['kind']}  "
            f"{block['parameters']:>14,} parameters ({block['share']:.1%})  {block['flops']:>18,} FLOPs"
            for block in found["blocks"]
        ),
        *(
            f"removing {left['share']:.0%} leaves {left['blocks']} blocks, {left['parameters']:,} parameters, "
            f"{left['flops']:,} FLOPs/forward"
            for left in found["removals"]
        ),
    ]
    return "\n".join(lines)


def _removal(graph: BlockGraph, share: float) -> dict[str, Any]:
    """What is left when middle blocks go until `share` of the parameters is gone (which ones is for scores to say)."""
    middle = (len(graph.blocks) - 1) / 2
    order = sorted(
        (block for block in graph.blocks if block.streams),
        key=lambda block: abs(graph.blocks.index(block) - middle),
    )
    gone: list[str] = []
    parameters = flops = 0
    for block in order[: len(graph.blocks) - 1]:
        if parameters >= share * graph.parameters:
            break
        gone.append(block.path)
        parameters += block.parameters
        flops += block.flops
    return {
        "share": share,
        "blocks": len(graph.blocks) - len(gone),
        "parameters": graph.parameters - parameters,
        "flops": graph.flops - flops,
    }
