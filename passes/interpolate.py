"""Interpolate a few-step student's weights with those that its training started from."""

from __future__ import annotations

import shutil
from typing import ClassVar

from pydantic import Field
from typing_extensions import override

from flcompress.core.program import FEW_STEP_START, Fact, Program
from flcompress.core.steps import Pass, PassContext
from flcompress.errors import PreconditionError


class Interpolate(Pass):
    """Move a few-step student's weights part of the way back to those that its training started from.

        w = (1 - start_share) w_student + start_share w_start

    The start is the transformer that `dmd` or `consistency` was given: pruned and recovered, with all that it had
    learnt from many clips and prompts. A training on few prompts forgets part of that, and guidance overshoots; both
    lessen on the way back, until few steps stop to be enough (docs/decisions/0020-interpolated-weights.md). It takes
    seconds, so `flcompress sweep` tries several shares on one training. Weights are read and written in pieces.

    Wortsman et al. 2022 (WiSE-FT, arXiv 2109.01903), equation 1, for classifiers.

    `- interpolate: {start_share: 0.2}`
    """

    name: ClassVar[str] = "interpolate"

    start_share: float = Field(
        ge=0,
        lt=1,
        description="share of the weights that few-step training started from; 0 leaves the student as it is",
    )

    @property
    @override
    def needs(self) -> frozenset[Fact]:
        return frozenset({Fact.FEW_STEP})

    @override
    def apply(self, program: Program, context: PassContext) -> Program:
        from flcompress.models.loading import meta_transformer, save_interpolated
        from flcompress.models.stock import state_shapes

        student = program.components["transformer"]
        start = program.components.get(FEW_STEP_START)
        if start is None:
            raise PreconditionError(
                f"interpolate: {student.parent} does not name the weights that its training started from, which "
                "earlier versions did not note; delete that folder and apply the recipe again, or leave interpolate out"
            )
        if state_shapes(meta_transformer(start)) != state_shapes(meta_transformer(student)):
            raise PreconditionError(
                f"interpolate: {student} has other tensors than {start}, where its training started; blocks were "
                "cut in between: put interpolate before prune"
            )
        target = context.directory / "transformer"
        shutil.rmtree(target, ignore_errors=True)  # of an attempt that was killed
        save_interpolated(student, start, self.start_share, target)
        return program.with_component("transformer", target)
