"""Feature distillation: the losses against their formulas, who gets which gradient, and a killed training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.core.program import Fact, Program
from flcompress.core.settings import Health
from flcompress.core.steps import PassContext
from flcompress.diffusion.network import Conditioning
from flcompress.draws import Draws
from flcompress.errors import PreconditionError
from flcompress.ir.graph import BlockGraph
from flcompress.models.families import family_of
from flcompress.passes.feature_distill import FeatureDistill
from flcompress.tracing.boundaries import clip_blocks
from flcompress.tracing.skip import graph_of
from flcompress.training.engines.replicated import Local
from flcompress.training.methods.feature_discriminator import (
    FeatureDiscriminator,
    discriminator_parameters,
    discriminator_term,
    student_term,
)
from flcompress.training.methods.feature_distill import FeatureDistillTraining, FeatureRoles, content_loss
from tests.fixtures.gaussian import teacher_contract
from tests.tracing import models

SHAPE = (3, 8, 8)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.floats(0.01, 100.0), st.integers(0, 50))
@settings(max_examples=20)
def test_the_content_loss_asks_each_boundary_for_the_same_accuracy(factor: float, seed: int) -> None:
    """A boundary ten times as large counts as before; samples count alike, however they are split."""
    kept = {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}
    student = {path: tokens(4, 6, 5, seed=seed + n) for n, path in enumerate(kept)}
    teacher = {path: tokens(4, 6, 5, seed=seed + 10 + n) for n, path in enumerate(kept.values())}
    loss = content_loss(student, teacher, kept)
    by_hand = sum(
        ((student[a][n] - teacher[b][n]).square().sum() / teacher[b][n].square().sum()) / 4
        for a, b in kept.items()
        for n in range(4)
    )
    torch.testing.assert_close(loss, torch.as_tensor(by_hand))
    larger = [{**part, path: factor * part[path]} for part, path in ((student, "blocks.1"), (teacher, "blocks.3"))]
    torch.testing.assert_close(content_loss(larger[0], larger[1], kept), loss)
    halves = [
        content_loss({a: student[a][rows] for a in kept}, {b: teacher[b][rows] for b in teacher}, kept)
        for rows in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2.0, loss)
    assert float(content_loss({a: teacher[b] for a, b in kept.items()}, teacher, kept)) == 0.0


def test_one_head_sees_each_frame_and_the_other_each_place() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = FeatureDiscriminator(6)
    features, level = tokens(2, 6, 4, 5, 5), torch.tensor([0.2, 0.7])
    logits = heads(features, level)
    assert logits.shape == (2, 2, 4, 5, 5)
    changed = features.clone()
    changed[:, :, 1, 2, 3] += 1.0
    spatial, temporal = (heads(changed, level) - logits).abs().amax(dim=0)
    assert spatial.amax(dim=(1, 2)).gt(0).tolist() == [False, True, False, False]
    assert temporal.amax(dim=0).nonzero().tolist() == [[2, 3]]
    assert temporal[:, 2, 3].gt(0).tolist() == [True, True, True, False]  # a kernel of three frames
    assert not torch.equal(heads(features, level + 0.1), logits)


def test_the_hinge_by_hand() -> None:
    teacher, student = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(discriminator_term(teacher, student)) == pytest.approx((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3)
    assert float(student_term(student)) == pytest.approx(2.0 / 3.0)


def test_the_plan_knows_the_size_of_the_discriminator() -> None:
    heads = FeatureDiscriminator(256)
    size = sum(weights.numel() for weights in heads.parameters())
    assert discriminator_parameters(8 * 16 * 256.0**2, 8) == pytest.approx(size, rel=0.1)


@dataclass
class RandomClips:
    """Random latents and conditioning of a model, with what a training asks of a dataset."""

    model: Any

    def __len__(self) -> int:
        return 16

    @property
    def negative(self) -> dict[str, torch.Tensor]:
        family = family_of(type(self.model).__name__)
        _, conditioning = self._clips(1, torch.Generator().manual_seed(0))
        return {name: conditioning[name] for name in family.prompt_names}

    def split(self, held_out: int) -> tuple[RandomClips, RandomClips]:
        return self, self

    def batch(self, n: int, draw: torch.Generator, mine: slice = slice(None)) -> tuple[torch.Tensor, Conditioning]:
        x0, conditioning = self._clips(n, draw)
        return x0[mine], {name: value[mine] for name, value in conditioning.items()}

    def by_size(self, n: int, draw: torch.Generator) -> Any:
        yield self._clips(n, draw)

    def _clips(self, n: int, draw: torch.Generator) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        family, config = family_of(type(self.model).__name__), self.model.config
        conditioning = family.example_conditioning(config, n, SHAPE, 8, draw)
        return torch.randn(n, family.channels(config), *SHAPE, generator=draw), conditioning


PIPELINES: dict[str, tuple[str, Callable[[], Any]]] = {
    "Wan": ("WanPipeline", lambda: models.wan()[0]),
    "CogVideoX": ("CogVideoXPipeline", lambda: models.cogvideox()[0]),
    "HunyuanVideo": ("HunyuanVideoPipeline", lambda: models.hunyuan_video()[0]),
}


def prepared(home: Path, name: str, *, cut: bool) -> tuple[Program, PassContext]:
    """A program whose transformer is the original, or the original without its first block of the clip."""
    pipeline, build = PIPELINES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
    graph = graph_of(model)
    model.save_pretrained(home / "original")
    kept = {block.path: block.path for block in graph.blocks}
    student: tuple[BlockGraph, Path] = graph, home / "original"
    if cut:
        from flcompress.tracing.removal.on_disk import remove_on_disk

        gone = clip_blocks(family_of(pipeline), graph)[0]
        removal = remove_on_disk(home / "original", [gone], home / "cut")
        student = removal.without(graph), home / "cut"
        kept = {new: old for old, new in removal.certificate.kept.items()}
    kind = "v_prediction" if name == "CogVideoX" else "flow"
    program = Program(
        graph=student[0],
        index={"_class_name": pipeline},
        latents=(4, *SHAPE),
        components={"transformer": student[1], "original": home / "original", "elastic": home / "original"},
        contract=teacher_contract(kind),
        teacher_contract=teacher_contract(kind),
        facts=frozenset({Fact.PRUNED}),
        kept=kept,
    )
    clips: Any = RandomClips(model)
    health = Health(samples=0, every=2, max_worsening=None)
    context = PassContext(
        directory=home, seed=0, data=lambda program: clips, progress=lambda *_: None, health=health,
        checkpoint_seconds=0.0,
    )  # fmt: skip
    return program, context


def training_of(**arguments: Any) -> FeatureDistillTraining:
    return FeatureDistill(**{"steps": 4, "batch": 4, "learning_rate": 1e-3, **arguments}).training


@pytest.mark.parametrize("name", PIPELINES)
def test_a_student_with_nothing_removed_has_the_teachers_features(tmp_path: Path, name: str) -> None:
    program, context = prepared(tmp_path, name, cut=False)
    roles = FeatureRoles(training_of(), program, Local(context))
    loss = roles._loss(Draws(0, 1, batch=4))
    assert (float(loss.figures["content_loss"]), float(loss.figures["motion_error"])) == (0.0, 0.0)
    assert float(loss.figures["task_loss"]) > 0.0
    ((real, fake, level),) = roles._judged
    assert real.shape[2:] == program.family.token_grid(roles._config, SHAPE)
    assert torch.equal(real, fake)
    assert len(level) == 4


@pytest.mark.parametrize("name", PIPELINES)
def test_boundaries_and_gradients_of_a_cut_student(tmp_path: Path, name: str) -> None:
    """Each kept block meets the teacher's of its original index; the student's backward leaves the discriminator be."""
    program, context = prepared(tmp_path, name, cut=True)
    roles = FeatureRoles(training_of(content_weight=0.5), program, Local(context))
    assert len(roles._kept) == len(clip_blocks(program.family, program.graph))
    assert all(program.kept[path] == original for path, original in roles._kept.items())
    loss = roles._loss(Draws(0, 1, batch=4))
    assert float(loss.figures["content_loss"]) > 0.0
    figures, discriminator = loss.figures, roles.discriminator
    total = figures["task_loss"] + 0.5 * figures["content_loss"] + figures["adversarial_loss"]
    torch.testing.assert_close(loss.value.detach(), total)
    torch.autograd.backward(loss.value)
    assert discriminator is not None
    assert all(weights.grad is None for weights in discriminator.model.parameters())
    touched = {path for path, weights in roles.student.model.named_parameters() if weights.grad is not None}
    assert all(any(key.startswith(f"{path}.") for key in touched) for path in roles._kept)
    assert not any(weights.requires_grad for weights in roles._teacher_model.parameters())

    roles.student.clear()
    judged = roles._discriminator_loss(Draws(0, 1, batch=4))
    torch.autograd.backward(judged.value)
    assert all(weights.grad is not None for weights in discriminator.model.parameters())
    assert all(weights.grad is None for weights in roles.student.model.parameters())


def test_the_adversarial_term_has_the_gradient_of_its_formula(tmp_path: Path) -> None:
    program, context = prepared(tmp_path, "Wan", cut=False)
    roles = FeatureRoles(training_of(), program, Local(context))
    assert roles.discriminator is not None
    features = tokens(2, 24, 3, 4, 4).requires_grad_()
    level = torch.tensor([0.3, 0.8])
    plain = student_term(roles.discriminator.model(features, level))
    (expected,) = torch.autograd.grad(plain, features)
    term = roles._adversarial(features, level)
    (found,) = torch.autograd.grad(3.0 * term, features)
    torch.testing.assert_close(term, plain)
    torch.testing.assert_close(found, 3.0 * expected)


def test_without_the_adversarial_term_there_is_no_discriminator(tmp_path: Path) -> None:
    program, context = prepared(tmp_path, "Wan", cut=True)
    roles = FeatureRoles(training_of(motion_weight=0.0), program, Local(context))
    assert roles.discriminator is None
    assert roles.trained == [roles.student]
    assert "adversarial_loss" not in roles.step(1, Draws(0, 1, batch=4))


def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's weights and, by what is logged of it afterwards, the discriminator with its moments."""
    program, context = prepared(tmp_path, "Wan", cut=True)
    runs: list[dict[str, torch.Tensor]] = []
    logs: list[list[dict[str, float]]] = []
    step = FeatureRoles.step
    for name, deadly in (("whole", False), ("killed", True)):
        own = replace(context, directory=tmp_path / name)
        own.directory.mkdir()
        if deadly:

            def killed(roles: FeatureRoles, number: int, draws: Draws) -> Any:
                if number == 3:
                    raise KeyboardInterrupt
                return step(roles, number, draws)

            monkeypatch.setattr(FeatureRoles, "step", killed)
            with pytest.raises(KeyboardInterrupt):
                training_of().weights(Local(own), program)
            monkeypatch.setattr(FeatureRoles, "step", step)
        steps, weights = training_of().weights(Local(own), program)
        assert steps == 4
        runs.append(weights)
        logs.append([json.loads(line) for line in (own.directory / "metrics.jsonl").read_text().splitlines()])
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert logs[0] == logs[1]
    assert {"elbo_pruned", "elbo_original"} <= logs[0][0].keys()
    assert {"discriminator_loss", "teacher_logit", "student_loss", "motion_error"} <= logs[0][1].keys()


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    program, context = prepared(tmp_path, "Wan", cut=True)
    figures = []
    for micro in (None, 2):
        roles = FeatureRoles(training_of(), program, Local(replace(context, micro_batch=micro)))
        figures.append(dict(roles.step(1, Draws(0, 1, batch=4))))
    assert figures[1] == pytest.approx(figures[0], rel=1e-4)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"content_weight: 0 given with motion_weight: 0, expected at least one above"):
        FeatureDistill(steps=1, content_weight=0.0, motion_weight=0.0)
    with pytest.raises(PreconditionError, match="feature-distill: needs the program to be pruned"):
        FeatureDistill(steps=1).flow(frozenset({Fact.TRAINED}))
    with pytest.raises(PreconditionError, match="feature-distill: the transformer is a few-step student already"):
        FeatureDistill(steps=1).flow(frozenset({Fact.PRUNED, Fact.FEW_STEP}))
    assert Fact.PRUNED in FeatureDistill(steps=1).flow(frozenset({Fact.PRUNED}))
    assert FeatureDistill(steps=1).training.optimisation.learning_rate == 1e-5
