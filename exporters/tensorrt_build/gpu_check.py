"""What every exporter of engines does with a GPU that can run them, and states in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flcompress.core.program import Program
from flcompress.core.records import ContractPart
from flcompress.exporters.shared import ExportPrecision
from flcompress.exporters.shared.parity import cases, compare, outputs, reference
from flcompress.runtime.inputs import Session, arguments_of, constants_of
from flcompress.runtime.sizes import Size

GPU_TOLERANCE = 10.0
"""A GPU sums in another order than the CPU that made the reference: this multiple of the ONNX export's tolerance."""


def checked_on_gpu(
    engine: Path,
    session: Session,
    program: Program,
    sizes: Sequence[Size],
    precision: ExportPrecision,
    tolerance: float,
    device: str,
) -> dict[str, Any]:
    """Compare an engine with torch on the GPU of this machine; return what a manifest states of it.

    Args:
        engine: its file or folder, for the message.
        session: the engine in memory.
        program: what was exported.
        sizes: what is compared.
        precision: the engine's.
        tolerance: largest absolute difference that is let through.
        device: the GPU.

    Raises:
        PostconditionError: the engine differs by more.
    """
    make = arguments_of(program)
    inputs = cases(make, program.contract.timesteps, sizes)
    constants = constants_of(make(sizes[0], [0.0] * sizes[0].batch, 0))
    expected = reference(program.components["transformer"], constants, precision, inputs, device)
    parity = compare(expected, outputs(session, inputs), tolerance)
    parity.require(str(engine), "please report it with the engine's manifest.json")
    return {
        "checked_on_gpu": True,
        "difference": parity.difference,
        "checked": {"sizes": [[size.batch, size.frames, size.height, size.width] for size in sizes]},
    }


def sampling_of(program: Program) -> dict[str, Any]:
    """Return what a manifest states of how the student is sampled, and of its blocks."""
    contract = program.contract
    return {
        "timesteps": list(contract.timesteps),
        "sigmas": list(contract.sigmas),
        "shift": contract.shift,
        "guidance_scale": contract.guidance_scale,
        "contract": ContractPart(**contract.to_dict()),
        "kept": dict(program.kept),
    }
