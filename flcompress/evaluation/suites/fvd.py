"""The suite `fvd`: Fréchet distance of clips to real ones in the features of a network that the user names.

A network takes float32 [1, 3, frames, height, width], RGB in [-1, 1], and returns [1, D]. An ONNX file says which
frames, height and width it wants, where they are fixed; a TorchScript file gets clips as they are. TorchScript is a
program: it is loaded because the user names it, and never by its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from typing_extensions import override

from flcompress.clip_figures import Frames
from flcompress.core.records import ScoreLine
from flcompress.core.suites import SuiteRequest
from flcompress.errors import FlcompressError, RequestError, first_line
from flcompress.evaluation.clips.prompts import Material
from flcompress.evaluation.suites.clip_suite import ClipContext, ClipSuite
from flcompress.evaluation.suites.session import Rows, Session, Task
from flcompress.evaluation.suites.tables import Figure, Measurement, Sets
from flcompress.files import key_of, sha256
from flcompress.runtime.onnx_providers import PROVIDERS, require_onnxruntime
from flcompress.stats import frechet_distance

Features = Callable[[torch.Tensor], torch.Tensor]

FEWEST = 4
"""Real clips without which there is no distance between two halves of them."""

CONTRACT = "a feature network takes float32 [1, 3, frames, height, width], RGB in [-1, 1], and returns [1, D]"


class FrechetVideoDistance(ClipSuite):
    """The distance that is called FVD where the network is the I3D of that name."""

    name: ClassVar[str] = "fvd"
    options: ClassVar[tuple[str, ...]] = ("features",)
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(key="frechet_features", label="Fréchet, named features", better=-1, headline=True),
    )

    def __init__(self) -> None:
        self._file, self._device = Path(), "cpu"

    @override
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        if request.own.get("features") is None:
            raise RequestError(
                f"--features: not given; the suite fvd needs an .onnx file, or one of TorchScript (.pt): {CONTRACT}"
            )
        self._file = Path(request.own["features"])
        if not self._file.is_file():
            raise RequestError(f"--features: {self._file}: no such file")
        return super().evaluate(request)

    @override
    def prepare(self, session: Session) -> dict[str, Any]:
        """Try the network on a clip of the size that is sampled."""
        self._device = session.device
        frames, height, width = session.home.size
        self._vector(np.zeros((frames, height, width, 3), np.uint8))
        return {"name": "feature network", "weights": {self._file.name: self._digest}}

    @override
    def material(self, session: Session, frames: Path) -> Material:
        material = super().material(session, frames)
        if material.data is None and not material.benchmark:
            raise RequestError(
                "--prompts: given with --suite fvd, which compares with real held-out clips; leave it out, so that "
                "prompts and clips are those of the run's data"
            )
        if material.data is not None and len(material.data) < FEWEST:
            raise RequestError(
                f"{material.data.folder}: {len(material.data)} held-out clips, expected at least {FEWEST}: a "
                "distance, and that of real clips to other real ones, need 2 on each side"
            )
        return material

    @override
    def key(self, task: Task, session: Session, judge: Mapping[str, Any]) -> str:
        return key_of(suite=self.name, version=self.version, clip=task.line.sha256, features=self._digest)

    @override
    def measure(self, frames: Frames, context: ClipContext) -> Measurement:
        return Measurement(figures={}, features={"named": self._vector(frames)})

    @override
    def of_set(self, clips: Sequence[Measurement], real: Sequence[Measurement]) -> Mapping[str, float]:
        if min(len(clips), len(real)) < 2:
            return {}
        sets = [torch.from_numpy(np.stack([clip.features["named"] for clip in each])) for each in (clips, real)]
        return {"frechet_features": frechet_distance(*sets)}

    @override
    def tables(self, sets: Sets, rows: Rows, session: Session) -> tuple[dict[str, Any], list[ScoreLine]]:
        plain, scores = super().tables(sets, rows, session)
        seeds = len({take.seed for take in sets.takes})
        each, wide = len(sets.takes) // seeds, len(next(iter(sets.clips.values()))[0].features["named"])
        fewest = min(each, len(sets.real))
        if fewest < wide:
            plain["warnings"].append(
                f"note: {fewest} clips for {wide} features: distances of so few are biased upward; compare models with "
                "each other and with the real clips' row, never with published figures"
            )
        return plain, scores

    @cached_property
    def _digest(self) -> str:
        return sha256(self._file)

    @cached_property
    def _network(self) -> tuple[Features, tuple[int | None, ...]]:
        """The network, and the frames, height and width that it wants; None where it takes any."""
        if self._file.suffix.lower() == ".onnx":
            return _open_onnx(self._file, self._device)
        return _open_torchscript(self._file, self._device), (None, None, None)

    def _vector(self, frames: Frames) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the features of a clip [D]; one line where the network does not take it."""
        network, wanted = self._network
        clip = _fit(frames, wanted, self._file)
        try:
            output = network(clip)
        except Exception as error:  # whatever a user's network raises
            raise RequestError(
                f"--features: {self._file}: fails on {_shape(clip)} ({first_line(error)[:200]}); {CONTRACT}"
            ) from error
        if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != 1:
            given = _shape(output) if isinstance(output, torch.Tensor) else type(output).__name__
            raise RequestError(f"--features: {self._file}: returns {given} for {_shape(clip)}; {CONTRACT}")
        if not bool(torch.isfinite(output).all()):
            raise FlcompressError(f"--features: {self._file}: returns values that are not finite for {_shape(clip)}")
        return np.asarray(output[0].double().cpu().numpy())


def _open_torchscript(path: Path, device: str) -> Features:
    try:
        with warnings.catch_warnings():  # torch names other formats for new files; published networks are of this one
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise RequestError(
            f"--features: {path}: no TorchScript file ({first_line(error)[:200]}); expected one, or .onnx"
        ) from error

    @torch.no_grad()
    def features(clip: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = module(clip.to(device))
        return output

    return features


def _open_onnx(path: Path, device: str) -> tuple[Features, tuple[int | None, ...]]:
    require_onnxruntime(f"--features: {path}")
    import onnxruntime

    names = [PROVIDERS[name] for name in (("cuda", "cpu") if device == "cuda" else ("cpu",))]
    providers = [name for name in names if name in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise RequestError(f"--features: {path}: no ONNX model ({first_line(error)[:200]})") from error
    entry, shape = session.get_inputs()[0].name, session.get_inputs()[0].shape
    if len(session.get_inputs()) != 1 or len(shape) != 5:
        raise RequestError(
            f"--features: {path}: {len(session.get_inputs())} inputs, the first of shape {shape}; {CONTRACT}"
        )

    def features(clip: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {entry: clip.numpy()})[0]))

    return features, tuple(size if isinstance(size, int) else None for size in shape[2:])


def _fit(frames: Frames, wanted: Sequence[int | None], path: Path) -> torch.Tensor:
    """Return a clip as the network wants it: its first frames, resized; float32 [1, 3, frames, height, width]."""
    length, height, width = (want or have for want, have in zip(wanted, frames.shape[:3], strict=True))
    if len(frames) < length:
        raise RequestError(f"--features: {path}: wants {length} frames, but clips have {len(frames)}")
    chosen = frames[:length]
    if chosen.shape[1:3] != (height, width):
        smaller = height * width < chosen.shape[1] * chosen.shape[2]
        way = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
        chosen = np.stack(
            [cv2.resize(np.ascontiguousarray(each), (width, height), interpolation=way) for each in chosen]
        )
    return torch.from_numpy(np.ascontiguousarray(chosen)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
