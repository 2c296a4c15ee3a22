"""The JSON files of a run directory as frozen records, which writers build and readers check.

Formats and old runs: a key that older versions did not write is optional and keeps the meaning that its absence had.
No file says its format while that is 1, so the bytes of existing files and everything hashed from them stay as they
are; the first incompatible change writes `"format": 2`, which this version refuses by name.
"""

from flcompress.core.records.base import AnyRecord, Record
from flcompress.core.records.evaluated import ClipLine, MeasuredLine, ScoreLine
from flcompress.core.records.exports import (
    EngineManifest,
    ExportManifest,
    FactsFile,
    OnnxManifest,
    TorchTensorRTManifest,
)
from flcompress.core.records.measured import (
    BenchFile,
    ClipPart,
    ContenderRow,
    EvalFile,
    FigurePart,
    Measured,
    PairedRow,
    SpeedRow,
    Spread,
    WorkPart,
)
from flcompress.core.records.passes import (
    RESULT_FILE,
    BlockScore,
    BreachLine,
    CandidateRow,
    HealthFile,
    ImportanceResult,
    LimitPart,
    PruneResult,
    RedrawsLine,
    SelectResult,
    StepsResult,
    StochasticDepthResult,
    StudentResult,
    TemporalAttentionResult,
)
from flcompress.core.records.run import (
    Attempt,
    AttemptsFile,
    ContractPart,
    EntryFile,
    Event,
    ExportFile,
    MetricsLine,
    ProgramFile,
    ResultFile,
    RunFile,
)
from flcompress.core.records.sweep import CellResult, Front, SweepCell, SweepFile, TeacherResult

__all__ = [
    "RESULT_FILE",
    "AnyRecord",
    "Attempt",
    "AttemptsFile",
    "BenchFile",
    "BlockScore",
    "BreachLine",
    "CandidateRow",
    "CellResult",
    "ClipLine",
    "ClipPart",
    "ContenderRow",
    "ContractPart",
    "EngineManifest",
    "EntryFile",
    "EvalFile",
    "Event",
    "ExportFile",
    "ExportManifest",
    "FactsFile",
    "FigurePart",
    "Front",
    "HealthFile",
    "ImportanceResult",
    "LimitPart",
    "Measured",
    "MeasuredLine",
    "MetricsLine",
    "OnnxManifest",
    "PairedRow",
    "ProgramFile",
    "PruneResult",
    "Record",
    "RedrawsLine",
    "ResultFile",
    "RunFile",
    "ScoreLine",
    "SelectResult",
    "SpeedRow",
    "Spread",
    "StepsResult",
    "StochasticDepthResult",
    "StudentResult",
    "SweepCell",
    "SweepFile",
    "TeacherResult",
    "TemporalAttentionResult",
    "TorchTensorRTManifest",
    "WorkPart",
]
