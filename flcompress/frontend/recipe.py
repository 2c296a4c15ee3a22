"""The recipe: what a user writes. Its fields are the keys of the file; docs/recipes.md is generated from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, InstanceOf, PrivateAttr, field_validator

from flcompress.core.settings import Data, Evaluation, Sampling, Settings, Training
from flcompress.core.steps import Exporter, Pass
from flcompress.diffusion.experts import Expert
from flcompress.errors import DataError, ModelError

_NAME = re.compile(r"[a-z0-9-]+")


class Model(Settings):
    """The model to start from. `model: FOLDER` is short for `model: {path: FOLDER}`."""

    path: Path = Field(
        description="diffusers pipeline folder; looked up next to the recipe, then from the working directory"
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
        "default: the model's own",
    )
    weights: Literal["trained", "random"] = Field(
        "trained", description="`random` starts from the folder's configurations alone, to train a model from nothing"
    )


class Recipe(Settings):
    """A recipe: a model, and the passes and exports to apply to it.

    `passes` and `exports` are lists of `name: {arguments}`; a name alone takes every default.
    """

    version: Literal[1] = Field(description="version of this file format")
    name: str = Field("", description="names the run directory `runs/NAME`; default: the file's name")
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
        """The recipe file; paths are looked up next to it first."""
        return self._file

    def written_in(self, file: Path, origins: dict[str, str]) -> Recipe:
        """Return the recipe with its file and the line of every key.

        Args:
            file: the recipe file.
            origins: the file and line of "model", "data", "passes[0]", ..., such as "recipes/x.yaml:12".
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
        """Return where a key stands, such as `recipes/x.yaml:12: model`, for error messages."""
        return f"{self._origins.get(key, self.file)}: {key}"

    def model_folder(self) -> Path:
        """The model folder, absolute; ModelError, naming both places looked at, where there is none."""
        return self._pipeline_folder(self.model.path, "")

    def partner_folder(self) -> Path | None:
        """The folder that `model.partner` names, absolute; ModelError likewise."""
        return None if self.model.partner is None else self._pipeline_folder(self.model.partner, ".partner")

    def _pipeline_folder(self, path: Path, key: str) -> Path:
        existing, tried = self._find(path)
        if existing is None or not existing.is_dir():
            where = f"{self.where('model')}{key}"
            raise ModelError(f"{where}: no folder {tried}; give the path of a diffusers pipeline folder")
        return existing

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
        """Return every key with its value, defaults included, existing paths absolute, as in RUN/recipe.yaml."""
        plain = self.model_dump(mode="json", by_alias=True, exclude={"passes", "exports"}, exclude_none=True)
        plain["model"]["path"] = str(self._find(self.model.path)[0] or self.model.path)
        if self.model.partner is not None:
            plain["model"]["partner"] = str(self._find(self.model.partner)[0] or self.model.partner)
        if self.data is not None and self.data.latents is not None:
            plain["data"]["latents"] = str(self._find(self.data.latents)[0] or self.data.latents)
        if self.data is not None and self.data.videos is not None:
            videos = {"folder": self.data.videos.folder, "captions": self.data.videos.captions}
            plain["data"]["videos"] = {key: str(self._find(path)[0] or path) for key, path in videos.items()}
        plain["passes"] = [{step.name: arguments(step)} for step in self.passes]
        plain["exports"] = [{step.name: arguments(step)} for step in self.exports]
        return plain

    def _data_path(self, key: str, path: Path) -> str:
        existing, tried = self._find(path)
        if existing is None:
            raise DataError(f"{self.where('data')}.{key}: no file or folder {tried}; give an existing path")
        return str(existing)

    def _find(self, path: Path) -> tuple[Path | None, str]:
        candidates = dict.fromkeys([(self.file.parent / path).resolve(), path.resolve()])
        existing = next((candidate for candidate in candidates if candidate.exists()), None)
        return existing, " nor ".join(map(str, candidates))


def arguments(step: Pass | Exporter) -> dict[str, Any]:
    """The arguments of a pass or exporter as plain data, defaults included; part of its cache key.

    `added` ones are left out while they have their default, so that earlier results keep their key.
    """
    fields = type(step).model_fields
    defaults = {name for name in step.added if getattr(step, name) == fields[name].default}
    return step.model_dump(mode="json", by_alias=True, exclude=defaults)
