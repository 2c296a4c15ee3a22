"""Watch a student while it is distilled: its samples and, of distribution matching, its critic and its gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flcompress.core.program import Program
from flcompress.core.settings import Health
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Network
from flcompress.diffusion.process import shift
from flcompress.draws import Draws
from flcompress.training.distillation.critic_lag import critic_lag
from flcompress.training.distillation.samples import TEACHER_REDRAWS, Prompts, Samples
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import REDRAWS, Limit, Redraws, Watch


class StudentEvaluation:
    """The held-out evaluations of one distillation.

    Args:
        context: the pass's.
        program: the program it distils; its teacher's contract is how the real score is sampled.
        contract: the student's.
        data: the source of the fixed prompts.
        batch: samples of a training step, over all processes; samples are generated in batches of the training size.
        generator: the trained role. Its moving average is kept, so that is what is sampled.
        student: the generator as a network.
        real: the teacher, or real score.
        fake: the fake score; None where nothing follows the student's distribution.
        score_range: lowest and highest noise level at which the scores are compared, before the shift.
    """

    def __init__(
        self,
        context: PassContext,
        program: Program,
        contract: SamplingContract,
        data: LatentDataset,
        *,
        batch: int,
        generator: TrainedRole,
        student: Network,
        real: Network,
        fake: Network | None = None,
        score_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self._context, self._contract, self._generator = context, contract, generator
        self._student, self._fake, self._real = student, fake, real
        self._at_once = context.at_once(batch)
        self._range, self._shift = score_range, program.teacher_contract.shift
        self._prompts = Prompts.choose(context, program, data, self._at_once)
        self._samples = Samples(self._prompts, program, real, program.teacher_contract)
        self._lagging = False

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Sample the student; return the figures of a step."""
        with self._generator.with_average():
            figures = self._samples.figures(step, self._student, self._contract)
        if self._fake is None:
            return figures
        lag, highest = self._lag(self._fake), self._context.health.max_critic_lag
        self._lagging = highest is not None and lag > highest
        return {**figures, "critic_lag": lag}

    def redraw(self, step: int) -> Redraws:
        """Return the figures with other noises; call after `evaluate`. The lag only if it is beyond its limit."""
        with self._generator.with_average():
            draws = [
                self._samples.redraw_figures(draw, self._student, self._contract) for draw in range(1, 1 + REDRAWS)
            ]
        if self._fake is not None and self._lagging:
            fake = self._fake
            draws = [{**figures, "critic_lag": self._lag(fake, draw)} for draw, figures in enumerate(draws, start=1)]
        return Redraws(draws, self._samples.teacher_figures())

    def _lag(self, fake: Network, draw: int = 0) -> float:
        """Return the fake score's lag behind the generator's live weights, at one level for each sample."""
        _, fresh = self._prompts.sample(self._student, self._contract, draw)
        total, world = self._prompts.total, self._context.world
        parts = (self._context.seed, "health", "critic lag", *([draw] if draw else []))
        draws = Draws(*parts, batch=total, rank=world.data_rank, processes=world.data_size)
        low, high = self._range
        # Levels are shuffled: a sample's level must not depend on which of the student's steps predicted it.
        u = (torch.randperm(total, generator=draws.shared)[draws.mine] + 0.5) / total
        level = shift(low + (high - low) * u, self._shift).to(fresh.device)
        noise = draws.normal(*fresh.shape[1:]).to(fresh.device)
        process, conditioning = self._contract.process, self._prompts.conditioning
        return critic_lag(
            fake, self._real, process, fresh, conditioning, level, noise, at_once=self._at_once, world=world
        )


def evaluation_forwards(health: Health, steps: int, student: float, teacher: int, *, critic: bool) -> float:
    """Return the forwards of all evaluations of a distillation, of one sample through the full transformer.

    Args:
        health: how often, and on how many samples.
        steps: steps of the training.
        student: forwards of one of the student's samples.
        teacher: forwards of one of the teacher's.
        critic: whether a fake score follows the student, whose lag is measured on samples of its own.
    """
    each = (1 + REDRAWS) * student + (student + 2.0) * critic
    return health.samples * (health.evaluations(steps) * each + (1 + TEACHER_REDRAWS) * teacher)


def student_watch(
    context: PassContext,
    name: str,
    health: StudentEvaluation | None,
    *,
    guidance: str,
    limits: Mapping[str, Limit] | None = None,
) -> Watch:
    """Return the watch over a distillation; without samples it judges only what the steps report.

    Args:
        context: the pass's.
        name: the pass's.
        health: the held-out evaluations.
        guidance: the pass's arguments that decide how strongly the teacher is guided.
        limits: figure -> limit, in addition to those of samples.
    """
    settings, none = context.health, (None, None)
    low, high = settings.deviation or none
    slow, fast = settings.motion or none
    over_driven = f"train for fewer steps, lower learning_rate, or lower {guidance}"
    return Watch(
        context,
        name=name,
        evaluate=health.evaluate if health is not None else lambda step: {},
        redraw=health.redraw if health is not None else None,
        held_out="sample_distance",
        limits={
            "sample_deviation": Limit(setting="deviation", low=low, high=high, fix=over_driven),
            "sample_motion": Limit(setting="motion", low=slow, high=fast, fix=over_driven),
            "sample_saturation": Limit(setting="max_saturation", high=settings.max_saturation, fix=over_driven),
            **(limits or {}),
        },
    )


def critic_limits(context: PassContext, *, adversarial: bool) -> dict[str, Limit]:
    """Return the limits of distribution matching on its critics and on its gradient's normaliser."""
    settings = context.health
    gap = Limit(
        setting="max_logit_gap",
        high=settings.max_logit_gap,
        fix="the discriminator tells all samples from clips, which teaches nothing: raise gan_r1, or lower "
        "critic_learning_rate",
    )
    return {
        "critic_lag": Limit(
            setting="max_critic_lag",
            high=settings.max_critic_lag,
            fix="raise critic_updates or critic_learning_rate, or lower learning_rate",
        ),
        "normaliser_min": Limit(
            setting="min_normaliser",
            low=settings.min_normaliser,
            fix="a sample at the teacher has an exploding gradient: train for fewer steps, or lower inter_cfg",
        ),
        **({"logit_gap": gap} if adversarial else {}),
    }
