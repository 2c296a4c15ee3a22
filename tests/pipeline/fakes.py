"""Passes and exporters that cost nothing, and an installation that knows them."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from flcompress.errors import TrainingError
from flcompress.pipeline import registry
from flcompress.pipeline.exporter import Exporter
from flcompress.pipeline.passes import Cost, Pass, ProgressSink, Role, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.pipeline.store import CHECKPOINTS

CALLS: list[str] = []
"""What was really run, in order."""


class Score(Pass):
    """Give facts."""

    name: ClassVar[str] = "score"
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SCORED})

    draws: int = Field(8, ge=1, description="how often it looks")
    rate: float = Field(1e-4, gt=0, description="how fast")
    probability: float = Field(0.5, ge=0, le=1, description="how likely")
    share: float = Field(0.3, gt=0, lt=1, description="how much")
    kind: Literal["one", "other"] = Field("one", description="which way")
    span: tuple[float, float] = Field((0.0, 1.0), description="from, to")

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(forwards=self.draws)

    def apply(self, program: Program, work: Work) -> Program:
        CALLS.append(f"score {self.draws}")
        (work.directory / "result.json").write_text(json.dumps({"draws": self.draws}), encoding="utf-8")
        (work.directory / "metrics.jsonl").write_text('{"step": 1}\n', encoding="utf-8")
        (work.directory / CHECKPOINTS / "step-00000001").mkdir(parents=True, exist_ok=True)
        work.progress(1, 1, {"loss": 0.5})
        return program


class Cut(Pass):
    """Copy the transformer, as if something had been cut from it."""

    name: ClassVar[str] = "cut"
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})

    keep: float = Field(gt=0, le=1, description="share that is kept")
    steps: int = Field(4, ge=1, description="sampling steps after")

    @property
    def needs(self) -> frozenset[Fact]:
        return frozenset({Fact.SCORED})

    def remaining(self, parameters: float) -> float:
        return parameters * self.keep

    def evaluations(self, evaluations: int) -> int:
        return self.steps

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        return Cost(
            steps=10,
            forwards=3000,
            batch=2,
            roles=(Role("model", parameters, trained=True), Role("teachers", 2 * parameters)),
        )

    def apply(self, program: Program, work: Work) -> Program:
        CALLS.append(f"cut {self.keep}")
        target = work.directory / "transformer"
        target.mkdir(exist_ok=True)
        for file in program.components["transformer"].iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return program.with_component("transformer", target)


class Slow(Pass):
    """Take a while, step by step, and go on where a killed attempt stopped."""

    name: ClassVar[str] = "slow"

    steps: int = Field(gt=0, description="steps")

    def apply(self, program: Program, work: Work) -> Program:
        log = work.directory / "steps.txt"
        done = len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0
        for step in range(done, self.steps):
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{step}\n")
            work.progress(step + 1, self.steps, {})
            time.sleep(0.02)
        return program


class Broken(Pass):
    """Fail in a chosen way."""

    name: ClassVar[str] = "broken"

    how: Literal["full disk", "training", "graph", "component"] = Field(description="the way")

    def apply(self, program: Program, work: Work) -> Program:
        if self.how == "full disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.how == "training":
            raise TrainingError("broken: the loss is nan at update 3; expected a finite number")
        if self.how == "graph":
            first, *_ = program.graph.blocks
            return Program(**{**vars(program), "graph": program.graph.without([first.path])})
        return program.with_component("vae", work.directory / "nowhere")


class Reader(Pass):
    """Read clips."""

    name: ClassVar[str] = "reader"
    needs_data: ClassVar[bool] = True

    def apply(self, program: Program, work: Work) -> Program:
        CALLS.append(f"reader {len(work.data(program))}")
        return program


class Text(Exporter):
    """Write a text."""

    name: ClassVar[str] = "text"

    words: str = Field("hello", description="what it says")

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        CALLS.append(f"text {self.words}")
        if self.words == "fail":
            (folder / "half").write_text("", encoding="utf-8")
            raise TrainingError("text: failed")
        (folder / "text.txt").write_text(self.words, encoding="utf-8")
        return {"characters": len(self.words)}


class Copy(Exporter):
    """Copy what `text` wrote."""

    name: ClassVar[str] = "copy"
    after: ClassVar[tuple[str, ...]] = ("text",)

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        words = (exports / "text" / "text.txt").read_text(encoding="utf-8")
        CALLS.append(f"copy {words}")
        (folder / "copy.txt").write_text(words, encoding="utf-8")
        return {}


class Unavailable(Exporter):
    """Lack something."""

    name: ClassVar[str] = "unavailable"

    def check(self) -> None:
        from flcompress.errors import UnavailableError

        raise UnavailableError("unavailable: no builder; pip install flcompress[builder]")

    def export(self, program: Program, folder: Path, exports: Path, progress: ProgressSink) -> dict[str, Any]:
        raise AssertionError("never reached")


PASSES: Mapping[str, type[Pass]] = {kind.name: kind for kind in (Score, Cut, Slow, Broken, Reader)}
EXPORTERS: Mapping[str, type[Exporter]] = {kind.name: kind for kind in (Text, Copy, Unavailable)}


@contextmanager
def installed() -> Iterator[None]:
    """The registry knows the fakes, and only them, while the context lasts."""
    kept = dict(registry.PASSES), dict(registry.EXPORTERS)
    for known, fakes in ((registry.PASSES, PASSES), (registry.EXPORTERS, EXPORTERS)):
        known.clear()
        known.update({name: f"{kind.__module__}:{kind.__name__}" for name, kind in fakes.items()})
    try:
        yield
    finally:
        registry.PASSES.clear()
        registry.PASSES.update(kept[0])
        registry.EXPORTERS.clear()
        registry.EXPORTERS.update(kept[1])
