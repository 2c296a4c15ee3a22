"""The other of two experts, as a program that exporters write beside the compressed one."""

from __future__ import annotations

from dataclasses import replace

from flcompress.core.program import Program
from flcompress.models.configs import read_json
from flcompress.models.loading import meta_transformer
from flcompress.tracing.counting import listed_blocks

PARTNER_FOLDER = "partner"
"""Where its export lies, in the folder of the compressed one's."""

KEPT_FILE = "kept_blocks.json"


def partner_of(program: Program) -> Program | None:
    """The program whose transformer is the partner, sampled by the same contract; None of a single transformer."""
    if program.contract.experts is None:
        return None
    folder = program.components["partner"]
    graph = listed_blocks(meta_transformer(folder))
    every = {block.path: block.path for block in graph.blocks}
    kept = read_json(folder / KEPT_FILE, "") if (folder / KEPT_FILE).is_file() else every
    return replace(program.with_component("transformer", folder), graph=graph, kept=kept)
