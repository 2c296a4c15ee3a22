"""The files of the run directory itself: what it is, its results, its programs, its journal, its exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, FiniteFloat
from typing_extensions import override

from flcompress.core.records.base import Fields, OpenRecord, Part, Record
from flcompress.errors import RequestError

Number = int | FiniteFloat
"""Of a contract, whose digest tells an int from the float of the same value, so reading must not convert it."""


class RunFile(Record):
    """`run.json`: whose run directory this is, and which stored results make up the run."""

    FIX = "give flcompress apply RECIPE again"

    name: str
    recipe_path: str
    created: str
    entries: list[str]
    finished: bool

    def folders(self, run: Path) -> list[Path]:
        """Return where the stored results are, the starting program's first.

        Args:
            run: the run directory.

        Raises:
            RequestError: one is gone.
        """
        folders = [(run / text).resolve() for text in self.entries]
        for folder in folders:
            if not folder.is_dir():
                raise RequestError(
                    f"{folder}: no such folder; {run} keeps a result there, in the --store of flcompress apply; "
                    f"put it back, or give flcompress apply {self.recipe_path} again"
                )
        return folders


class EntryFile(Record):
    """`entry.json` of a stored result: everything that decides it, and what it took over all attempts."""

    FIX = "remove its folder, then give flcompress apply RECIPE again"

    key: str
    name: str
    index: int
    arguments: dict[str, Any] = Field(default_factory=dict)
    seconds: FiniteFloat = 0.0
    peak_rss_mb: FiniteFloat | None = None
    peak_gpu_mb: FiniteFloat | None = None
    peak_gpu_reserved_mb: FiniteFloat | None = None
    attempts: int = 1


class Attempt(Part):
    """Time and peak memory of one attempt."""

    seconds: FiniteFloat
    peak_rss_mb: FiniteFloat
    peak_gpu_mb: FiniteFloat | None = None
    peak_gpu_reserved_mb: FiniteFloat | None = None


class AttemptsFile(Record):
    """`attempts.json`: every attempt at the work whose key this is."""

    key: str
    attempts: list[Attempt]


class PlannedFigures(Part):
    """The plan of a pass on the machine that it ran on, made when the run started.

    Attributes:
        machine: name of the GPU; "process" where it runs on a CPU.
        gpu: whether it runs on GPUs: the memory is then a GPU's, else the process's own.
        processes: processes that share the pass.
        memory: peak bytes of one process.
        seconds: duration; None on a GPU whose speed is not known.
        forwards: forwards of one sample, a backward counted as two, without those that checkpointing repeats.
        flops: FLOPs of these forwards at the largest size of the data.
        peak_flops: FLOP/s that the makers of all GPUs together state for the pass's precision; None where not known.
    """

    machine: str
    gpu: bool
    processes: int
    memory: FiniteFloat
    seconds: FiniteFloat | None = None
    forwards: FiniteFloat
    flops: FiniteFloat
    peak_flops: FiniteFloat | None = None


class Event(OpenRecord):
    """One line of `journal.jsonl`. Passes add keys of their own."""

    FIX = "remove that line"

    time: str | FiniteFloat | None = None
    event: str
    name: str = ""
    key: str = ""
    folder: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)
    status: str = ""
    seconds: FiniteFloat | None = None
    peak_rss_mb: FiniteFloat | None = None
    peak_gpu_mb: FiniteFloat | None = None
    peak_gpu_reserved_mb: FiniteFloat | None = None
    clips_per_second: FiniteFloat | None = None
    utilisation: FiniteFloat | None = None
    planned: PlannedFigures | None = None
    attempts: int = 1
    error: str = ""
    threads: int | None = None


class MetricsLine(OpenRecord):
    """One line of `metrics.jsonl`: the figures of a step, or those of a held-out evaluation.

    A figure that is not finite is written as NaN or Infinity, so that a resumed training judges it as before.
    """

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="constants")

    step: int

    @property
    def figures(self) -> Fields:
        """Figure -> value."""
        return self.more


class ResultFile(OpenRecord):
    """`result.json` of any pass: its own summary."""


class ExportFile(OpenRecord):
    """`exports/NAME.json`: what the exporter returned, and what it took."""

    FIX = "remove it, then give flcompress export again"

    key: str = ""
    seconds: FiniteFloat | None = None
    peak_rss_mb: FiniteFloat | None = None
    peak_gpu_mb: FiniteFloat | None = None
    peak_gpu_reserved_mb: FiniteFloat | None = None
    attempts: int | None = None

    @override
    def dump(self) -> dict[str, Any]:
        """Return the plain JSON object: what the exporter returned comes first."""
        plain = super().dump()
        return {key: plain[key] for key in sorted(plain, key=lambda key: key not in self.more)}


class ContractPart(Part):
    """A sampling contract as `SamplingContract.to_dict` gives it."""

    prediction: str = "flow"
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"
    scheduler: dict[str, Any]
    num_inference_steps: int
    sigmas: list[Number]
    timesteps: list[Number]
    guidance_scale: Number
    max_sequence_length: int
    given_sigmas: list[Number] | None = None
    embedded_guidance: Number | None = None
    experts: dict[str, Any] | None = None
    guidance_convention: str = ""
    mu: Number | None = None
    ends: list[Number] | None = None
    negative_prompt: str = ""

    def dump(self) -> dict[str, Any]:
        """Return the plain JSON object that `SamplingContract.from_dict` reads."""
        return self.model_dump(mode="json", exclude_unset=True)


class ProgramFile(Record):
    """`program.json`: a program without its block graph."""

    FIX = EntryFile.FIX

    components: dict[str, str]
    contract: ContractPart
    teacher_contract: ContractPart
    facts: list[str]
    prune_set: list[str]
    kept: dict[str, str]
    index: dict[str, Any]
    latents: tuple[int, int, int, int]
