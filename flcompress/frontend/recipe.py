"""The recipe: what a user writes. Its fields are the keys of the file; docs/recipes.md is generated from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, PrivateAttr, field_validator, model_validator

from flcompress.core.exporter import Exporter
from flcompress.core.health import Health
from flcompress.core.passes import EngineName, LogName, Pass, Precision
from flcompress.diffusion.experts import Expert
from flcompress.errors import DataError, ModelError

_NAME = re.compile(r"[a-z0-9-]+")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Model(_Part):
    """The model to start from. `model: FOLDER` is short for `model: {path: FOLDER}`."""

    path: Path = Field(
        description="diffusers pipeline folder; looked for beside the recipe, then from the working directory"
    )
    pipeline: str | None = Field(
        None,
        description="stock pipeline class to use it with, where not the one its model_index.json names: "
        "WanImageToVideoPipeline makes Wan 2.2 TI2V-5B start from a first frame",
    )
    expert: Expert | None = Field(
        None,
        description="of a model with two (Wan 2.2 A14B), the one to compress: high or low noise; its partner stays as "
        "it is, and is compressed by a recipe of its own",
    )
    partner: Path | None = Field(
        None,
        description="diffusers export of the recipe that compressed the other expert, which then takes its place; "
        "the model's own where left out",
    )
    weights: Literal["trained", "random"] = Field(
        "trained", description="`random` starts from the folder's configurations alone, to train a model from nothing"
    )


class Sampling(_Part):
    """How the model is meant to be sampled before compression; the reference of every comparison."""

    num_inference_steps: int = Field(50, ge=1, le=1000, description="network calls along a path, guidance aside")
    guidance_scale: float = Field(4.0, ge=0, description="text guidance, in the convention named below")
    guidance_convention: Literal["unconditional", "conditional"] = Field(
        "unconditional", description="`unconditional` is u + w (c - u); `conditional` is c + w (c - u)"
    )
    guidance_scale_2: float | None = Field(
        None,
        ge=0,
        description="the same for the low-noise expert of a model with two; guidance_scale where left out",
    )
    negative_prompt: str = Field(
        "",
        description="what text guidance leads away from: the model's own sampling, and the teacher in a distillation",
    )
    max_sequence_length: int = Field(512, ge=1, description="tokens a prompt is padded to")
    embedded_guidance: float | None = Field(
        None, gt=0, description="scale that a guidance-distilled network is told; the family's usual one where left out"
    )
    num_frames: int | None = Field(None, ge=1, description="frames of the clips that are sampled; 1 for images")
    height: int | None = Field(None, ge=1, description="their height in pixels")
    width: int | None = Field(None, ge=1, description="their width in pixels")

    @model_validator(mode="after")
    def _whole_size(self) -> Sampling:
        given = {name: getattr(self, name) for name in ("num_frames", "height", "width")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"nothing given for {' and '.join(missing)}, expected num_frames, height and width together"
            )
        return self

    @property
    def decisive(self) -> dict[str, Any]:
        """Its part of a cache key; an empty negative prompt leaves keys as they were before there was one."""
        return self.model_dump(mode="json", exclude=None if self.negative_prompt else {"negative_prompt"})

    @property
    def size(self) -> tuple[int, int, int] | None:
        """(frames, height, width) in pixels of what is sampled; None where the recipe does not say."""
        if self.num_frames is None or self.height is None or self.width is None:
            return None
        return self.num_frames, self.height, self.width

    @property
    def scale(self) -> float:
        """The guidance scale in the convention u + w (c - u)."""
        return self._in_our_convention(self.guidance_scale)

    @property
    def scale_2(self) -> float:
        """The low-noise expert's, in the same convention."""
        return self.scale if self.guidance_scale_2 is None else self._in_our_convention(self.guidance_scale_2)

    def _in_our_convention(self, scale: float) -> float:
        if self.guidance_convention == "unconditional":
            return scale
        from flcompress.diffusion.guidance import from_conditional_convention

        return from_conditional_convention(scale)


class MovingDigits(_Part):
    """Clips of the embedded benchmark, rendered when needed."""

    clips: int = Field(gt=0, description="training clips to render")


class Videos(_Part):
    """Video files with captions; encoded once, at the size that `sampling` names or their own, and remembered."""

    folder: Path = Field(description="folder of video files; see docs/data.md")
    captions: Path = Field(description="captions of the videos: .jsonl or .csv with file and caption")


class Data(_Part):
    """Where training clips come from: exactly one of the three."""

    moving_digits: MovingDigits | None = Field(None, alias="moving-digits", description="the embedded benchmark")
    latents: Path | None = Field(None, description="folder that `flcompress encode` wrote")
    videos: Videos | None = Field(None, description="video files with captions")

    @model_validator(mode="after")
    def _exactly_one(self) -> Data:
        given = [key for key, value in self.model_dump(by_alias=True).items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'nothing'} given, expected one of moving-digits, latents, videos"
            )
        return self


class Evaluation(_Part):
    """How large `flcompress eval` makes its comparison."""

    clips_per_prompt: int = Field(3, ge=1, description="clips sampled for each held-out prompt and seed")
    seeds: int = Field(4, ge=2, description="independent repetitions; the confidence intervals come from them")


_NOT_DECISIVE = {"engine", "processes", "timeout", "checkpoint_seconds", "micro_batch", "health", "log_to"}


class Training(_Part):
    """How passes that train compute; decides memory and speed."""

    engine: EngineName = Field(
        "local",
        description="how the processes of a launcher share a training: ddp copies models, zero1 to zero3 (DeepSpeed) "
        "shard optimiser, gradients and weights, fsdp2 shards all of them; see docs/training.md",
    )
    processes: int | None = Field(
        None, ge=1, description="how many processes must run; whatever the launcher started where left out"
    )
    timeout: float = Field(1800.0, gt=0, description="seconds after which a process that does not move ends the run")
    checkpoint_seconds: float = Field(
        60.0,
        ge=0,
        description="between two checkpoints: the most work that a killed run loses, whatever a step takes; "
        "0 writes one after every step",
    )
    precision: Precision = Field("fp32", description="bf16: autocast over fp32 weights, and frozen models held in bf16")
    gradient_checkpointing: bool = Field(
        False, description="compute blocks again in the backward instead of keeping what they did; a third more work"
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="samples in memory at once in one process, at most; gradients of a larger batch are added up, with "
        "the same result and one optimiser step a batch. Its whole share where left out",
    )
    compile: bool = Field(
        False,
        description="run blocks through torch.compile; on a CPU it needs a C++ compiler and the first steps are slow",
    )

    health: Health = Field(Health(), description="how trainings are watched, and what ends one; see docs/health.md")
    log_to: tuple[LogName, ...] = Field(
        ("tensorboard",),
        description="where figures and sample strips go beside the report: tensorboard (left out where it is not "
        "installed) and wandb (which has to be)",
    )

    @property
    def decisive(self) -> dict[str, Any]:
        """What changes a result; who shares the work and who watches it does not.

        So another launch finds the work and goes on, and a training that a limit ended can be taken up with another.
        """
        return self.model_dump(mode="json", exclude=_NOT_DECISIVE)


class Recipe(_Part):
    """What to do to which model.

    `passes` and `exports` are lists of `name: {arguments}`; a name alone takes every default.
    """

    version: Literal[1] = Field(description="version of this file format")
    name: str = Field("", description="names the run directory `runs/NAME`; the file's name where left out")
    model: Model = Field(description="the model to start from")
    sampling: Sampling = Field(Sampling(), description="how that model is sampled")
    data: Data | None = Field(None, description="clips for passes that train or score")
    seed: int = Field(0, ge=0, lt=2**31, description="decides every random draw")
    passes: tuple[InstanceOf[Pass], ...] = Field((), description="what is done to the model, in order")
    exports: tuple[InstanceOf[Exporter], ...] = Field((), description="what the result is written as, in order")
    training: Training = Field(Training(), description="how passes that train compute")
    evaluation: Evaluation = Field(Evaluation(), description="size of the comparison that `flcompress eval` makes")

    _file: Path = PrivateAttr(Path("recipe.yaml"))
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def file(self) -> Path:
        """The recipe file; paths are looked for beside it first."""
        return self._file

    def written_in(self, file: Path, origins: dict[str, str]) -> Recipe:
        """The same recipe that knows where it stands.

        Args:
            file: the recipe file.
            origins: where "model", "data", "passes[0]", ... were written, such as "recipes/x.yaml:12".
        """
        located = self.model_copy()
        located._file, located._origins = file, origins
        return located

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name} given, expected lower-case letters, digits and hyphens; set name: in the recipe")
        return name

    def where(self, key: str) -> str:
        """ "recipes/x.yaml:12: model", for error messages."""
        return f"{self._origins.get(key, self.file)}: {key}"

    def model_folder(self) -> Path:
        """The model folder, absolute; ModelError, naming both places looked at, where there is none."""
        return self._pipeline_folder(self.model.path, "")

    def partner_folder(self) -> Path | None:
        """The folder that `model.partner` names, absolute; ModelError likewise."""
        return None if self.model.partner is None else self._pipeline_folder(self.model.partner, ".partner")

    def _pipeline_folder(self, path: Path, key: str) -> Path:
        found, tried = self._find(path)
        if found is None or not found.is_dir():
            where = f"{self.where('model')}{key}"
            raise ModelError(f"{where}: no folder {tried}; give the path of a diffusers pipeline folder")
        return found

    def data_spec(self) -> dict[str, Any] | None:
        """`data` as a plain mapping with its one key, its paths absolute.

        Raises:
            DataError: a path that does not exist, naming both places looked at.
        """
        if self.data is None:
            return None
        if self.data.moving_digits is not None:
            return {"moving-digits": {"clips": self.data.moving_digits.clips}}
        if self.data.videos is not None:
            parts = {"folder": self.data.videos.folder, "captions": self.data.videos.captions}
            return {"videos": {key: self._data_path(f"videos.{key}", path) for key, path in parts.items()}}
        assert self.data.latents is not None
        return {"latents": self._data_path("latents", self.data.latents)}

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, paths absolute where they exist: what RUN/recipe.yaml holds."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"passes", "exports"}, exclude_none=True)
        plain["model"]["path"] = str(self._find(self.model.path)[0] or self.model.path)
        if self.model.partner is not None:
            plain["model"]["partner"] = str(self._find(self.model.partner)[0] or self.model.partner)
        if self.data is not None and self.data.latents is not None:
            plain["data"]["latents"] = str(self._find(self.data.latents)[0] or self.data.latents)
        if self.data is not None and self.data.videos is not None:
            given = {"folder": self.data.videos.folder, "captions": self.data.videos.captions}
            plain["data"]["videos"] = {key: str(self._find(path)[0] or path) for key, path in given.items()}
        plain["passes"] = [{step.name: arguments(step)} for step in self.passes]
        plain["exports"] = [{step.name: arguments(step)} for step in self.exports]
        return plain

    def _data_path(self, key: str, path: Path) -> str:
        found, tried = self._find(path)
        if found is None:
            raise DataError(f"{self.where('data')}.{key}: no file or folder {tried}; give an existing path")
        return str(found)

    def _find(self, path: Path) -> tuple[Path | None, str]:
        places = dict.fromkeys([(self.file.parent / path).resolve(), path.resolve()])
        found = next((place for place in places if place.exists()), None)
        return found, " nor ".join(map(str, places))


def arguments(step: Pass | Exporter) -> dict[str, Any]:
    """The arguments of a pass or exporter as plain data, defaults included; part of its cache key."""
    return step.model_dump(mode="json", by_alias=True)
