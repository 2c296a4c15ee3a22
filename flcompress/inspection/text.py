"""An inspection as text for people."""

from __future__ import annotations

from typing import Any

from flcompress import wording
from flcompress.inspection.model import CHOICE, Inspection, Other, Removal
from flcompress.ir.graph import BlockGraph


def inspection_text(inspection: Inspection) -> str:
    """An inspection as text for people."""
    plain, graph = inspection.to_dict(), inspection.graph
    lines = [f"{inspection.model}: {graph.model_class}, {len(graph.blocks)} blocks, {graph.parameters:,} parameters"]
    if inspection.timesteps:
        lines.append(f"one of two experts: it answers the timesteps {inspection.timesteps} (high noise)")
    if inspection.clip and inspection.latents:
        shape = " x ".join(map(str, inspection.latents))
        lines.append(
            f"at {inspection.clip.height} x {inspection.clip.width} x {inspection.clip.frames} frames "
            f"(latents {shape}) and {inspection.clip.tokens} tokens of text: {graph.flops:,} FLOPs a forward"
        )
    if inspection.unknown_flops:
        lines.append(f"FLOPs not counted: {inspection.unknown_flops}")
    lines.append("")
    rows = [("", "kind", "parameters", "share", "FLOPs", "share")]
    for stack in plain["stacks"]:
        counted = f"{stack['blocks']} blocks, counted by {stack['config_key'] or 'no config key'}"
        rows.append((stack["path"], counted, *_figures(stack)))
        own = [block for block in plain["blocks"] if block["stack"] == stack["path"]]
        rows += [("  " + block["path"], block["kind"], *_figures(block)) for block in own]
    outside = graph.parameters - sum(block.parameters for block in graph.blocks)
    rest = graph.flops - sum(block.flops for block in graph.blocks)
    others = {
        "parameters": outside,
        "share": outside / graph.parameters,
        "flops": None if inspection.unknown_flops else rest,
        "flops_share": None if inspection.unknown_flops else rest / graph.flops,
    }
    rows.append(("outside blocks", "", *_figures(others)))
    lines += wording.table(rows, left=2)
    lines += ["", f"what removals would leave ({CHOICE}):"]
    lines += [f"  {_removal_text(removal, graph)}" for removal in inspection.removals]
    lines += [_other_text(other) for other in inspection.others]
    return "\n".join(lines)


def _figures(figures: dict[str, Any]) -> tuple[str, str, str, str]:
    if figures["flops"] is None:
        return f"{figures['parameters']:,}", f"{wording.share(figures['share'], 2)}", "-", "-"
    return (
        f"{figures['parameters']:,}",
        f"{wording.share(figures['share'], 2)}",
        f"{figures['flops']:,}",
        f"{wording.share(figures['flops_share'], 2)}",
    )


def _other_text(other: Other) -> str:
    role = f"the other expert, timesteps {other.timesteps} (low noise)" if other.timesteps else "another transformer"
    description = "its config.json is not here"
    if other.blocks is not None:
        description = (
            f"{other.model_class}, {other.blocks} blocks, {other.parameters:,} parameters; inspect its folder for more"
        )
    return f"{other.name}: {role}: {description}"


def _removal_text(left: Removal, graph: BlockGraph) -> str:
    if left.problem:
        return f"removing {wording.share(left.share, 0)}: not possible: {left.problem}"
    flops = "" if left.flops is None else f", {left.flops:,} FLOPs ({wording.share(left.flops / graph.flops)})"
    return (
        f"removing {wording.share(left.share, 0)} leaves {left.blocks} blocks, "
        f"{left.parameters:,} parameters ({wording.share(left.parameters / graph.parameters)}){flops}"
    )
