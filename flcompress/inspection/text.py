"""An inspection as text for people."""

from __future__ import annotations

from typing import Any

from flcompress.inspection.model import CHOICE, Inspection, Other, Removal
from flcompress.ir.graph import BlockGraph
from flcompress.wording import table


def inspection_text(found: Inspection) -> str:
    """An inspection as text for people."""
    plain, graph = found.to_dict(), found.graph
    lines = [f"{found.model}: {graph.model_class}, {len(graph.blocks)} blocks, {graph.parameters:,} parameters"]
    if found.timesteps:
        lines.append(f"one of two experts: it answers the timesteps {found.timesteps} (high noise)")
    if found.clip and found.latents:
        shape = " x ".join(map(str, found.latents))
        lines.append(
            f"at {found.clip.height} x {found.clip.width} x {found.clip.frames} frames (latents {shape}) and "
            f"{found.clip.tokens} tokens of text: {graph.flops:,} FLOPs a forward"
        )
    if found.unknown_flops:
        lines.append(f"FLOPs not counted: {found.unknown_flops}")
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
        "flops": None if found.unknown_flops else rest,
        "flops_share": None if found.unknown_flops else rest / graph.flops,
    }
    rows.append(("outside blocks", "", *_figures(others)))
    lines += table(rows, left=2)
    lines += ["", f"what removals would leave ({CHOICE}):"]
    lines += [f"  {_removal_text(removal, graph)}" for removal in found.removals]
    lines += [_other_text(one) for one in found.others]
    return "\n".join(lines)


def _figures(held: dict[str, Any]) -> tuple[str, str, str, str]:
    if held["flops"] is None:
        return f"{held['parameters']:,}", f"{held['share']:.2%}", "-", "-"
    return f"{held['parameters']:,}", f"{held['share']:.2%}", f"{held['flops']:,}", f"{held['flops_share']:.2%}"


def _other_text(one: Other) -> str:
    role = f"the other expert, timesteps {one.timesteps} (low noise)" if one.timesteps else "another transformer"
    held = "its config.json is not here"
    if one.blocks is not None:
        held = f"{one.model_class}, {one.blocks} blocks, {one.parameters:,} parameters; inspect its folder for more"
    return f"{one.name}: {role}: {held}"


def _removal_text(left: Removal, graph: BlockGraph) -> str:
    if left.problem:
        return f"removing {left.share:.0%}: not possible: {left.problem}"
    flops = "" if left.flops is None else f", {left.flops:,} FLOPs ({left.flops / graph.flops:.1%})"
    return (
        f"removing {left.share:.0%} leaves {left.blocks} blocks, "
        f"{left.parameters:,} parameters ({left.parameters / graph.parameters:.1%}){flops}"
    )
