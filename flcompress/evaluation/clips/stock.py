"""Models that only their stock pipeline can sample: a folder of stock diffusers, UNets included, as a contender."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flcompress.clip_figures import Frames
from flcompress.data.pictures import open_picture
from flcompress.errors import ModelError, RequestError
from flcompress.evaluation.clips.samplers import Home, Maker, noise_seed, student_of
from flcompress.models.configs import read_index
from flcompress.models.stock import no_progress_bars
from flcompress.models.stock_files import folder_digest
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.progress import ProgressSink
from flcompress.runtime.clip_folder import Item

_LIBRARIES = ("diffusers", "transformers")


class StockFile(BaseModel):
    """A YAML file that names a pipeline folder, with the arguments of its call."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid")

    path: Path
    name: str | None = None
    frame_rate: float | None = Field(None, gt=0)
    call: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


def maker_against(path: Path, home: Home, names: list[str]) -> Maker:
    """Return the contender that `--against PATH` names: a run, a stock pipeline folder, or a file that names one.

    Raises:
        RequestError: neither of these; ModelError: a folder whose classes are not stock ones.
    """
    if (path / "run.json").is_file():
        return student_of(path, home, names)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        try:
            plain = yaml.safe_load(path.read_text(encoding="utf-8"))
            stock = StockFile.model_validate(plain)
        except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else None
            what = (
                f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else " ".join(str(error).split())[:200]
            )
            raise RequestError(f"{path}: {what}; expected path, and name, frame_rate and call if wanted") from error
        stock = stock.model_copy(update={"path": (path.parent / stock.path).resolve()})
    elif (path / "model_index.json").is_file():
        stock = StockFile(path=path)
    else:
        raise RequestError(
            f"--against: {path}: no run (run.json), no diffusers pipeline folder (model_index.json) and no .yaml file "
            "that names one"
        )
    return StockMaker(stock, home, names)


class StockMaker:
    """A pipeline folder behind its stock pipeline's own call.

    The noise comes from a generator with the clip's seed, so that a pipeline that draws as the house does starts from
    the same noise. Arguments that the file does not give are the run's size, and else the call's defaults.
    """

    def __init__(self, stock: StockFile, home: Home, names: list[str]) -> None:
        index = read_index(stock.path)
        self._stock, self._home, self._loaded, self.home = stock, home, None, self
        self._class = _pipeline_class(stock.path, index)
        self._arguments = self._call_arguments()
        name = stock.name or stock.path.name
        self.name = next(each for each in (name, *(f"{name}-{n}" for n in range(2, 99))) if each not in names)
        self.label = f"{self.name}, {self._argument('num_inference_steps', 50)} steps, stock pipeline"
        self.steps = self.evaluations = int(self._argument("num_inference_steps", 50))
        self.guidance = float(self._argument("guidance_scale", self._argument("max_guidance_scale", 1.0)) or 1.0)
        self.frame_rate = float(stock.frame_rate or self._argument("fps", None) or home.frame_rate)
        self.parameters = 0
        self.decoding_seconds: float | None = None
        self.identity = {
            "folder": folder_digest(stock.path),
            "call": {name: str(value) for name, value in sorted(self._arguments.items())},
            "frame_rate": self.frame_rate,
        }

    @property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self._class.__call__).parameters)

    def _argument(self, name: str, otherwise: Any) -> Any:
        if name in self._arguments:
            return self._arguments[name]
        known = self._parameters.get(name)
        return otherwise if known is None or known.default is inspect.Parameter.empty else known.default

    def _call_arguments(self) -> dict[str, Any]:
        known = self._parameters
        unknown = sorted(set(self._stock.call) - set(known))
        if unknown:
            raise RequestError(
                f"--against: call.{unknown[0]}: a {self._class.__name__} takes no such argument; it takes "
                f"{', '.join(name for name in known if name != 'self')}"
            )
        sizes = dict(zip(("num_frames", "height", "width"), self._home.size, strict=True))
        return {name: value for name, value in sizes.items() if name in known} | self._stock.call

    def prepare(self, items: Sequence[Item]) -> None:
        """Do nothing: the pipeline encodes prompts itself."""

    @torch.no_grad()
    def clip(self, item: Item, seed: int, number: int, count: ProgressSink) -> Frames:
        """Call the stock pipeline."""
        pipeline, known = self._pipeline(), self._parameters
        given: dict[str, Any] = dict(self._arguments)
        given["generator"] = torch.Generator().manual_seed(noise_seed(item, seed, number))
        if "prompt" in known:
            given["prompt"] = item.prompt
        if "image" in known:
            given["image"] = self._image(item)
        with no_progress_bars():
            output = pipeline(**given, output_type="pil")
        count(self.evaluations, self.evaluations, {})
        frames = output.frames[0] if hasattr(output, "frames") else output.images[:1]
        return np.stack([np.asarray(frame.convert("RGB")) for frame in frames])

    def _image(self, item: Item) -> Any:
        """Return the first frame, scaled to cover the clip and cropped as for every other model."""
        if item.image is None:
            raise RequestError(
                f"--against: a {self._class.__name__} makes a clip from its first frame, but this run's model starts "
                "from text; compare it with a run of an image-to-video model"
            )
        _, height, width = self._home.size
        size = int(self._argument("width", width)), int(self._argument("height", height))
        return ImageOps.fit(open_picture(item.image), size, Image.Resampling.LANCZOS)

    @no_progress_bars()
    def _pipeline(self) -> Any:
        if self._loaded is None:
            device = self._home.device
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            pipeline = self._class.from_pretrained(str(self._stock.path), dtype=dtype, use_safetensors=True)
            pipeline.set_progress_bar_config(disable=True)
            self._loaded = pipeline.to(device)
        return self._loaded

    def release(self) -> None:
        """Free the pipeline."""
        self._loaded = None
        free_gpu_memory()


def _pipeline_class(folder: Path, index: dict[str, Any]) -> Any:
    """Return the stock class of a pipeline folder; ModelError if it, or that of a part, is none of the libraries'."""
    import diffusers

    name = str(index.get("_class_name"))
    found = getattr(diffusers, name, None)
    if found is None or not issubclass(found, diffusers.DiffusionPipeline):
        raise ModelError(f"{folder / 'model_index.json'}: _class_name is {name!r}, expected a pipeline of diffusers")
    for part, kind in index.items():
        if isinstance(kind, list) and kind[0] is not None and kind[0] not in _LIBRARIES:
            raise ModelError(
                f"{folder / 'model_index.json'}: {part} is of {kind[0]}, expected diffusers or transformers: no code "
                "from elsewhere is run"
            )
    return found
