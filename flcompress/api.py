"""The public interface for authors of passes, exporters, back ends, families and suites. See docs/writing-a-pass.md.

Everything listed in `__all__` keeps its name and meaning between minor versions (docs/stability.md); other modules are
laid out for the house's own sake and may move. Each name is imported when it is first used, so that the module of a
pass, which every check of a recipe imports, stays light: import torch inside `apply`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flcompress.core.backend import Backend as Backend
    from flcompress.core.backend import OpenNetwork as OpenNetwork
    from flcompress.core.backend import TransformerFiles as TransformerFiles
    from flcompress.core.optimisation import Optimisation as Optimisation
    from flcompress.core.program import Fact as Fact
    from flcompress.core.program import Program as Program
    from flcompress.core.records import ExportManifest as ExportManifest
    from flcompress.core.settings import EngineName as EngineName
    from flcompress.core.settings import Health as Health
    from flcompress.core.settings import Precision as Precision
    from flcompress.core.settings import Training as Training
    from flcompress.core.steps import Cost as Cost
    from flcompress.core.steps import Exporter as Exporter
    from flcompress.core.steps import Pass as Pass
    from flcompress.core.steps import PassContext as PassContext
    from flcompress.core.steps import Role as Role
    from flcompress.data.dataset import LatentDataset as LatentDataset
    from flcompress.diffusion.contract import SamplingContract as SamplingContract
    from flcompress.diffusion.network import Conditioning as Conditioning
    from flcompress.distributed.world import World as World
    from flcompress.draws import Draws as Draws
    from flcompress.draws import generator as generator
    from flcompress.errors import DataError as DataError
    from flcompress.errors import FlcompressError as FlcompressError
    from flcompress.errors import ModelError as ModelError
    from flcompress.errors import NotRemovable as NotRemovable
    from flcompress.errors import PostconditionError as PostconditionError
    from flcompress.errors import PreconditionError as PreconditionError
    from flcompress.errors import RequestError as RequestError
    from flcompress.errors import TrainingError as TrainingError
    from flcompress.errors import UnavailableError as UnavailableError
    from flcompress.evaluation.suites.clip_suite import ClipContext as ClipContext
    from flcompress.evaluation.suites.clip_suite import ClipSuite as ClipSuite
    from flcompress.evaluation.suites.tables import Figure as Figure
    from flcompress.evaluation.suites.tables import Measurement as Measurement
    from flcompress.ir.block import Block as Block
    from flcompress.ir.graph import BlockGraph as BlockGraph
    from flcompress.models.families import family_of as family_of
    from flcompress.models.families import register_family as register_family
    from flcompress.models.families.family import ClipSize as ClipSize
    from flcompress.models.families.family import Family as Family
    from flcompress.models.families.family import LatentShape as LatentShape
    from flcompress.models.families.family import OriginalNames as OriginalNames
    from flcompress.models.families.family import TokenAxes as TokenAxes
    from flcompress.models.loading import load_transformer as load_transformer
    from flcompress.models.loading import save_transformer as save_transformer
    from flcompress.models.network import as_network as as_network
    from flcompress.models.video import encode_clips as encode_clips
    from flcompress.progress import ProgressSink as ProgressSink
    from flcompress.runtime.backends.export_backend import ExportBackend as ExportBackend
    from flcompress.training.engines import Engine as Engine
    from flcompress.training.engines import Hyper as Hyper
    from flcompress.training.engines import engine_of as engine_of
    from flcompress.training.feed import Feed as Feed
    from flcompress.training.loop import train as train
    from flcompress.training.role import Loss as Loss
    from flcompress.training.role import TrainedRole as TrainedRole
    from flcompress.training.watching.monitor import Watch as Watch

_DOOR = {
    # what a pass is, and what it gets
    "Cost": "flcompress.core.steps",
    "Exporter": "flcompress.core.steps",
    "Optimisation": "flcompress.core.optimisation",
    "Pass": "flcompress.core.steps",
    "PassContext": "flcompress.core.steps",
    "Role": "flcompress.core.steps",
    "ProgressSink": "flcompress.progress",
    "World": "flcompress.distributed.world",
    # settings of a recipe that a pass meets
    "EngineName": "flcompress.core.settings",
    "Health": "flcompress.core.settings",
    "Precision": "flcompress.core.settings",
    "Training": "flcompress.core.settings",
    # what it rewrites
    "Block": "flcompress.ir.block",
    "BlockGraph": "flcompress.ir.graph",
    "Fact": "flcompress.core.program",
    "LatentDataset": "flcompress.data.dataset",
    "Program": "flcompress.core.program",
    "SamplingContract": "flcompress.diffusion.contract",
    # models and their families
    "ClipSize": "flcompress.models.families.family",
    "Conditioning": "flcompress.diffusion.network",
    "Family": "flcompress.models.families.family",
    "LatentShape": "flcompress.models.families.family",
    "OriginalNames": "flcompress.models.families.family",
    "TokenAxes": "flcompress.models.families.family",
    "as_network": "flcompress.models.network",
    "encode_clips": "flcompress.models.video",
    "family_of": "flcompress.models.families",
    "load_transformer": "flcompress.models.loading",
    "register_family": "flcompress.models.families",
    "save_transformer": "flcompress.models.loading",
    # training
    "Draws": "flcompress.draws",
    "Engine": "flcompress.training.engines",
    "Feed": "flcompress.training.feed",
    "Hyper": "flcompress.training.engines",
    "Loss": "flcompress.training.role",
    "TrainedRole": "flcompress.training.role",
    "Watch": "flcompress.training.watching.monitor",
    "engine_of": "flcompress.training.engines",
    "generator": "flcompress.draws",
    "train": "flcompress.training.loop",
    # running
    "Backend": "flcompress.core.backend",
    "ExportBackend": "flcompress.runtime.backends.export_backend",
    "ExportManifest": "flcompress.core.records",
    "OpenNetwork": "flcompress.core.backend",
    "TransformerFiles": "flcompress.core.backend",
    # judging clips
    "ClipContext": "flcompress.evaluation.suites.clip_suite",
    "ClipSuite": "flcompress.evaluation.suites.clip_suite",
    "Figure": "flcompress.evaluation.suites.tables",
    "Measurement": "flcompress.evaluation.suites.tables",
    # errors
    "DataError": "flcompress.errors",
    "FlcompressError": "flcompress.errors",
    "ModelError": "flcompress.errors",
    "NotRemovable": "flcompress.errors",
    "PostconditionError": "flcompress.errors",
    "PreconditionError": "flcompress.errors",
    "RequestError": "flcompress.errors",
    "TrainingError": "flcompress.errors",
    "UnavailableError": "flcompress.errors",
}

__all__ = [
    "Backend",
    "Block",
    "BlockGraph",
    "ClipContext",
    "ClipSize",
    "ClipSuite",
    "Conditioning",
    "Cost",
    "DataError",
    "Draws",
    "Engine",
    "EngineName",
    "ExportBackend",
    "ExportManifest",
    "Exporter",
    "Fact",
    "Family",
    "Feed",
    "Figure",
    "FlcompressError",
    "Health",
    "Hyper",
    "LatentDataset",
    "LatentShape",
    "Loss",
    "Measurement",
    "ModelError",
    "NotRemovable",
    "OpenNetwork",
    "Optimisation",
    "OriginalNames",
    "Pass",
    "PassContext",
    "PostconditionError",
    "Precision",
    "PreconditionError",
    "Program",
    "ProgressSink",
    "RequestError",
    "Role",
    "SamplingContract",
    "TokenAxes",
    "TrainedRole",
    "Training",
    "TrainingError",
    "TransformerFiles",
    "UnavailableError",
    "Watch",
    "World",
    "as_network",
    "encode_clips",
    "engine_of",
    "family_of",
    "generator",
    "load_transformer",
    "register_family",
    "save_transformer",
    "train",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name: str) -> Any:
        if name not in _DOOR:
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        return getattr(import_module(_DOOR[name]), name)
