"""The program: what passes rewrite. A block graph, weights on disk, a sampling contract, and facts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.experts import COMPONENTS, OTHER
from flcompress.ir.graph import BlockGraph
from flcompress.ir.selection import By
from flcompress.ir.serial import content_hash, from_json, to_json
from flcompress.models.stock_files import folder_digest

if TYPE_CHECKING:
    import torch

    from flcompress.models.families.family import Family
    from flcompress.models.parts import Parts

PROGRAM_FILE = "program.json"
GRAPH_FILE = "graph.json"

FACTS_FILE = "flcompress.json"
"""In an exported pipeline folder: its sampling contract, arguments of the call, sizes."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints that an interrupted training resumes from; no part of a result."""


FEW_STEP_START = "few_step_start"
"""Component that a few-step pass adds: the transformer that it was given, which `interpolate` moves back to."""


class Fact(StrEnum):
    """A fact about a program. Passes declare which they need, give and void."""

    TRAINED = "trained"
    """The transformer's weights come from training, not from a random start."""
    SCORED = "scored"
    """Every block of the graph has an importance."""
    ATTENTION_SCORED = "attention-scored"
    """Every block of the graph has a temporal attention."""
    SELECTED = "selected"
    """The prune set was chosen as a set."""
    ELASTIC = "depth-elastic"
    """The unpruned transformer works with any subset of its prune set skipped."""
    PRUNED = "pruned"
    """The transformer lacks the blocks of its prune set."""
    FEW_STEP = "few-step"
    """The transformer is sampled in few steps without guidance."""


CHOICE_NEEDS: Mapping[By, frozenset[Fact]] = {
    "importance": frozenset({Fact.SCORED}),
    "joint": frozenset({Fact.SELECTED}),
    "temporal-attention": frozenset({Fact.ATTENTION_SCORED}),
}
"""What a choice of blocks needs, where it needs anything."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A video diffusion model on its way through the compiler. Immutable; a pass returns a new one.

    Attributes:
        graph: block graph of the current transformer.
        index: the model folder's `model_index.json`: the pipeline class and the class of each part.
        latents: (channels, frames, height, width) of what is sampled.
        components: component name -> folder, as in a diffusers pipeline ("transformer", "vae", "text_encoder",
            "tokenizer", ...), and two more: "original", the transformer the recipe started from, and "elastic", the
            unpruned transformer that "transformer" was cut from (the original, or what stochastic depth made of it);
            of a few-step student also `FEW_STEP_START`.
            Of two experts these are the one that is compressed; "partner" is the other, as it is sampled with
            "transformer", and "original_partner" as it is sampled with "original".
        contract: how the current transformer is sampled.
        teacher_contract: how "original" is sampled.
        facts: what holds.
        prune_set: paths, in the unpruned transformer, of the blocks chosen for removal.
        kept: path in the current transformer -> path in the original, for every block.
        frame_rate: frames a second of the run's data, where it knows them; it belongs to the run, so it is not saved.
    """

    graph: BlockGraph
    index: Mapping[str, Any]
    latents: tuple[int, int, int, int]
    components: Mapping[str, Path]
    contract: SamplingContract
    teacher_contract: SamplingContract
    facts: frozenset[Fact] = frozenset()
    prune_set: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)
    frame_rate: float | None = None

    @property
    def pipeline_class(self) -> str:
        """The stock pipeline class."""
        return str(self.index["_class_name"])

    @property
    def family(self) -> Family:
        """The family, which knows what tracing cannot find out about the model."""
        from flcompress.models.families import family_of

        return family_of(self.pipeline_class)

    def parts(self, device: str = "cpu", autoencoder: torch.dtype | None = None) -> Parts:
        """Text encoders and autoencoder, each loaded when first used; see `Parts`."""
        from flcompress.models.parts import Parts

        return Parts(self.index, self.components, device, autoencoder)

    def check(self) -> None:
        """Raise ModelError unless the headers of the files show that every component is complete."""
        from flcompress.models.part_check import check_part

        own = self.index["transformer"]  # the class of the components that the stock pipeline lacks, too
        kinds = {folder: self.index.get(name) or own for name, folder in self.components.items()}
        for folder, kind in kinds.items():
            check_part(folder, kind)

    @property
    def transformers(self) -> dict[str, Path]:
        """The transformers as the stock pipeline names them: "transformer", and "transformer_2" of two experts."""
        folders = {self.own_name: self.components["transformer"]}
        if (experts := self.contract.experts) is not None:
            folders[COMPONENTS[OTHER[experts.compressed]]] = self.components["partner"]
        return dict(sorted(folders.items()))

    @property
    def own_name(self) -> str:
        """The stock pipeline's name of the transformer that is compressed."""
        return COMPONENTS[self.contract.experts.compressed] if self.contract.experts else "transformer"

    def with_few_step(self, folder: Path, contract: SamplingContract) -> Program:
        """Return the program with a few-step student of its transformer, which it notes as the student's start."""
        start = self.components["transformer"]
        return replace(
            self.with_component(FEW_STEP_START, start).with_component("transformer", folder), contract=contract
        )

    def with_component(self, name: str, folder: Path) -> Program:
        """Return the program with one component replaced."""
        return replace(self, components={**self.components, name: folder})

    @property
    def digest(self) -> str:
        """Return the SHA-256 over everything that decides what this program computes: contents, not paths."""
        canonical = {
            "graph": content_hash(self.graph),
            "components": {name: folder_digest(path) for name, path in sorted(self.components.items())},
            **self._plain(),
        }
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        return {
            "contract": self.contract.to_dict(),
            "teacher_contract": self.teacher_contract.to_dict(),
            "facts": sorted(self.facts),
            "prune_set": list(self.prune_set),
            "kept": dict(self.kept),
            "index": dict(self.index),
            "latents": list(self.latents),
        }

    def save(self, folder: Path) -> None:
        """Write `program.json` and `graph.json`; component folders are named relative to `folder`."""
        from flcompress.core.records import ProgramFile  # dozens of models, which no check of a recipe needs

        folder.mkdir(parents=True, exist_ok=True)
        components = {name: os.path.relpath(path, folder) for name, path in sorted(self.components.items())}
        ProgramFile(components=components, **self._plain()).write(folder / PROGRAM_FILE)
        (folder / GRAPH_FILE).write_text(to_json(self.graph) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Program:
        """Read what `save` wrote."""
        from flcompress.core.records import ProgramFile  # dozens of models, which no check of a recipe needs

        record = ProgramFile.read(folder / PROGRAM_FILE)
        return cls(
            graph=from_json((folder / GRAPH_FILE).read_text(encoding="utf-8"), str(folder / GRAPH_FILE)),
            components={name: (folder / path).resolve() for name, path in record.components.items()},
            contract=SamplingContract.from_dict(record.contract.dump()),
            teacher_contract=SamplingContract.from_dict(record.teacher_contract.dump()),
            facts=frozenset(map(Fact, record.facts)),
            prune_set=tuple(record.prune_set),
            kept=record.kept,
            index=record.index,
            latents=record.latents,
        )
