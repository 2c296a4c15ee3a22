"""The part of two experts in a plan."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from flcompress.core.program import Fact
from flcompress.core.steps import Pass, Role
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.student import student_contract
from flcompress.driver.start import Source, transformer_folders
from flcompress.frontend.recipe import Recipe
from flcompress.models.families import family_of
from flcompress.models.loading import meta_transformer


class PlannedExperts:
    """The part of two experts in a plan: the partner held in memory, and whose evaluations are counted.

    For a single transformer nothing changes.

    Args:
        recipe: the recipe.
        source: the model that it starts from.
    """

    def __init__(self, recipe: Recipe, source: Source) -> None:
        self._source = source
        self._sampled = recipe.training.health.samples > 0
        self._folders = transformer_folders(recipe, source.folder, source.contract.experts)

    @cached_property
    def _partners(self) -> tuple[int, int]:
        """Parameters of the teacher's partner, and of the student's."""
        return _parameters(self._folders["original_partner"]), _parameters(self._folders["partner"])

    def extra_roles(self, step: Pass) -> tuple[Role, ...]:
        """Return the partners that a student needs to take the steps before a low-noise one, and to finish samples."""
        experts = self._source.contract.experts
        if experts is None or Fact.FEW_STEP not in step.gives:
            return ()
        roles = []
        if experts.compressed == "low" or self._sampled:
            roles.append(Role("partner", self._partners[1]))
        if self._sampled and self._folders["partner"] != self._folders["original_partner"]:
            roles.append(Role("teacher's partner", self._partners[0]))
        return tuple(roles)

    def work_ratio(self, parameters: float, evaluations: int) -> tuple[int, float]:
        """Return the final evaluations of a sample, and evaluations times parameters, before over after.

        Args:
            parameters: parameters of the compressed transformer after the last pass.
            evaluations: steps of its student, or the model's own evaluations without one.
        """
        before = self._source.contract
        original = float(self._source.graph.parameters)
        if before.experts is None:
            return evaluations, before.evaluations / evaluations * original / parameters
        after = before
        if evaluations != before.evaluations:
            after = student_contract(before, evaluations, family_of(self._source.index["_class_name"]).sigmas)
        teacher, student = self._partners
        return after.evaluations, _work(before, original, teacher) / _work(after, parameters, student)


def _work(contract: SamplingContract, own: float, partner: float) -> float:
    return contract.own_evaluations * own + (contract.evaluations - contract.own_evaluations) * partner


def _parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in meta_transformer(folder).parameters())
