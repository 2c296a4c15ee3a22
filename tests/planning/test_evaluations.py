"""The forwards of held-out evaluations: what a plan counts is what trainings of the tiny model make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanTransformer3DModel

from flcompress.core.settings import Health
from flcompress.driver.manager import apply
from flcompress.frontend.loading import load_recipe
from flcompress.planning.machines import gpu_machine
from flcompress.planning.plan import make_plan
from flcompress.planning.text import plan_text
from flcompress.progress import QuietDisplay
from flcompress.training.loop import _Run
from flcompress.training.methods import pretraining, stochastic_depth
from flcompress.training.watching.held_out import HeldOutELBO
from tests.fixtures.tiny import tiny_pipeline

RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 3, guidance_scale: 2.0, max_sequence_length: 16}}
data: {{moving-digits: {{clips: 16}}}}
training: {{health: {{every: 2, on_breach: warn, samples: 3, max_critic_lag: null}}, log_to: []}}
passes:
{passes}
"""
CLIPS = 4
"""A quarter of the dataset, which is what a small one has to spare."""


def counted(step: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Any]:
    """Carry out passes; return the samples that its held-out evaluations sent through any transformer, and the last."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_pipeline(folder / "model"), passes=f"  - {step}"))
    depth, samples = 0, 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1

        return call

    forward: Callable[..., Any] = WanTransformer3DModel.forward

    def counting(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal samples
        samples += len(hidden_states) * bool(depth)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(_Run, "evaluate", watched(_Run.evaluate))
    monkeypatch.setattr(HeldOutELBO, "__call__", watched(HeldOutELBO.__call__))
    monkeypatch.setattr(WanTransformer3DModel, "forward", counting)
    apply(recipe, folder / "run", display=QuietDisplay(), device="cpu")
    return samples, load_recipe(recipe).passes[-1]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "step",
    [
        "pretrain: {steps: 3, batch: 2}",
        "stochastic-depth: {by: middle, remove: 0.3, steps: 4, batch: 2}",
        "dmd: {student_steps: 2, inter_cfg: [2, 2], steps: 3, critic_updates: 1, batch: 2}",
        "consistency: {student_steps: 2, levels: 3, guidance: 2.0, steps: 4, batch: 2}",
        "prune: {by: middle, remove: 0.3}\n  - feature-distill: {steps: 3, batch: 2}",
    ],
)
def test_the_plan_counts_what_evaluations_make(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward counted as one of the whole model: a student's share of it is in the plan's own numbers."""
    monkeypatch.setattr(pretraining, "MONITOR_CLIPS", CLIPS)
    monkeypatch.setattr(stochastic_depth, "HELD_OUT_CLIPS", CLIPS)
    samples, found = counted(step, tmp_path, monkeypatch)
    whole = found.model_copy(update={"remove": 0.0}) if found.name == "stochastic-depth" else found
    assert samples == whole.evaluation_forwards(1.0, 1.0, 3 * 2, Health(every=2, samples=3)) > 0


def test_a_pruned_student_makes_smaller_forwards(tmp_path: Path) -> None:
    health, recipe = Health(every=50, samples=8), tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(model=tiny_pipeline(tmp_path / "model"), passes="  - dmd: {student_steps: 4, steps: 100}")
    )
    (dmd,) = load_recipe(recipe).passes
    # Three evaluations: nine draws and the critic's of four half steps, then both scores; the teacher three times.
    assert dmd.evaluation_forwards(0.5, 1.0, 100, health) == 8 * (3 * (10 * 4 * 0.5 + 2) + 3 * 100)
    assert dmd.evaluation_forwards(0.5, 1.0, 100, Health(samples=0)) == 0.0


def test_the_plan_gives_their_share_of_the_time(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(model=tiny_pipeline(tmp_path / "model"), passes="  - dmd: {student_steps: 4, steps: 100}")
    )
    loaded = load_recipe(recipe)
    plan = make_plan(loaded, machine=gpu_machine(loaded, "h100"))
    rare = load_recipe(recipe, ["training.health.every=1000"])
    less = make_plan(rare, machine=gpu_machine(rare, "h100"))
    assert 0 < less.passes[0].evaluating < plan.passes[0].evaluating < plan.seconds
    assert plan.seconds - less.seconds == pytest.approx(plan.passes[0].evaluating - less.passes[0].evaluating)
    assert " are held-out evaluations (training.health.every)" in plan_text(plan)
