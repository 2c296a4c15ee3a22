"""Which of two experts a recipe compresses, and what its partner is (docs/decisions/0008-two-experts.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flcompress.core.program import FACTS_FILE, Fact
from flcompress.diffusion.contract import PipelineSigmas, SamplingContract
from flcompress.diffusion.experts import COMPONENTS, OTHER, Experts
from flcompress.diffusion.student import student_contract
from flcompress.errors import RecipeError
from flcompress.frontend.recipe import Recipe


def read_experts(recipe: Recipe, index: Mapping[str, Any]) -> Experts | None:
    """The experts of the recipe's model; None of a model with one transformer.

    Args:
        recipe: the recipe.
        index: the model folder's `model_index.json`, checked.

    Raises:
        RecipeError: two experts and no choice between them, or a choice, or their arguments, for a single transformer.
    """
    ratio, model, sampling = index.get("boundary_ratio"), recipe.model, recipe.sampling
    if ratio is None:
        given = (
            ("model", "expert", model.expert),
            ("model", "partner", model.partner),
            ("sampling", "guidance_scale_2", sampling.guidance_scale_2),
        )
        for part, key, value in given:
            if value is not None:
                raise RecipeError(
                    f"{recipe.where(part)}.{key}: {value} given, but this {index['_class_name']} has one transformer; "
                    "leave it out"
                )
        return None
    if model.expert is None:
        raise RecipeError(
            f"{recipe.where('model')}.expert: nothing given, but this {index['_class_name']} has two experts; expected "
            f"high (transformer, timesteps from {ratio * 1000:g}) or low (transformer_2, those below): a recipe "
            "compresses one, and a second recipe the other"
        )
    return Experts(boundary_ratio=ratio, compressed=model.expert, guidance_scale=sampling.scale_2)


def with_partner(recipe: Recipe, teacher: SamplingContract, pipeline_sigmas: PipelineSigmas | None) -> SamplingContract:
    """The teacher's contract that knows the steps for which the recipe's partner was distilled, if it was.

    Raises:
        RecipeError: the partner is no export of another recipe for the other expert, or is made for another schedule;
            the model itself is such an export.
    """
    folder = recipe.partner_folder()
    if (experts := teacher.experts) is not None and teacher.stochastic:
        raise RecipeError(
            f"{recipe.where('model')}.path: {recipe.model_folder()} is the few-step result of another recipe; give the "
            "model that one started from, and this folder as model.partner"
        )
    if folder is None or experts is None:
        return teacher
    where = f"{recipe.where('model')}.partner"
    found = _contract(folder, where)
    wanted = OTHER[experts.compressed]
    if found.experts is None or found.experts.compressed != wanted:
        what = "a single transformer" if found.experts is None else f"its {found.experts.compressed}-noise expert"
        raise RecipeError(f"{where}: {folder} is a pipeline compressed at {what}, expected at the {wanted}-noise one")
    if found.experts.boundary_ratio != experts.boundary_ratio:
        raise RecipeError(
            f"{where}: boundary_ratio {found.experts.boundary_ratio:g} in {folder}, but this model's is "
            f"{experts.boundary_ratio:g}; expected an export of the same model"
        )
    if found.sigmas == teacher.sigmas:
        return teacher
    steps = found.num_inference_steps
    distilled = replace(teacher, experts=replace(experts, partner_steps=steps))
    sigmas = student_contract(distilled, steps, pipeline_sigmas).sigmas
    if found.sigmas != sigmas:
        raise RecipeError(
            f"{where}: {folder} is sampled at sigmas {_few(found.sigmas)}, a student of this model at "
            f"{_few(sigmas)}; expected an export of the same model, with the same sampling"
        )
    _check_steps(recipe, steps, where)
    return distilled


def transformer_folders(recipe: Recipe, home: Path, experts: Experts | None) -> dict[str, Path]:
    """The components of a starting program that are transformers.

    Args:
        recipe: the recipe.
        home: where the model's own weights lie.
        experts: of the model.
    """
    own = home / (COMPONENTS[experts.compressed] if experts else "transformer")
    found = {"transformer": own, "original": own, "elastic": own}
    if experts is not None:
        name = COMPONENTS[OTHER[experts.compressed]]
        found |= {"original_partner": home / name, "partner": (recipe.partner_folder() or home) / name}
    return found


def _contract(folder: Path, where: str) -> SamplingContract:
    from flcompress.models.configs import read_json
    from flcompress.models.folder import check_pipeline

    path = folder / FACTS_FILE
    if not path.is_file():
        raise RecipeError(
            f"{where}: {folder} has no {FACTS_FILE}; expected the diffusers export of another recipe, "
            "RUN/exports/diffusers"
        )
    check_pipeline(folder)
    return SamplingContract.from_dict(read_json(path, "an exported pipeline has one")["contract"])


def _check_steps(recipe: Recipe, steps: int, where: str) -> None:
    """RecipeError unless the recipe makes a student of as many steps: each expert alone would be sampled wrongly."""
    made = [step.evaluations(0) for step in recipe.passes if Fact.FEW_STEP in step.gives]
    if made != [steps]:
        told = f"this recipe's student takes {made[0]}" if made else "no pass of this recipe gives few steps"
        raise RecipeError(
            f"{where}: made for {steps} steps, but {told}; expected a dmd pass with student_steps: {steps}"
        )


def _few(numbers: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{number:.4g}' for number in numbers[:4])}{', ...' if len(numbers) > 4 else ''}]"
