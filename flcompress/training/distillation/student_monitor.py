"""What is watched while a student is distilled (stage III): samples, the critic's lag, the gradient's normaliser."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flcompress.core.program import Program
from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.network import Network
from flcompress.diffusion.process import shift
from flcompress.draws import Draws
from flcompress.training.distillation.samples import Prompts, Samples
from flcompress.training.role import TrainedRole
from flcompress.training.watching.held_out import critic_lag
from flcompress.training.watching.monitor import REDRAWS, Limit, Redraws, Watch


class StudentHealth:
    """The looks at one distillation.

    Args:
        work: of the pass.
        program: what it distils; its teacher's contract is how the real score is sampled.
        contract: the student's.
        data: where the fixed prompts come from.
        batch: samples of a training step, over all processes: as many at a time are sampled as are trained on.
        generator: the trained role. What is kept is its moving average, so that is what is sampled.
        student: the generator as a network.
        fake: the fake score.
        real: the real score.
        score_range: lowest and highest noise level at which the scores are compared, before the shift.
    """

    def __init__(
        self,
        work: PassContext,
        program: Program,
        contract: SamplingContract,
        data: LatentDataset,
        *,
        batch: int,
        generator: TrainedRole,
        student: Network,
        fake: Network,
        real: Network,
        score_range: tuple[float, float],
    ) -> None:
        self._work, self._contract, self._generator = work, contract, generator
        self._student, self._fake, self._real = student, fake, real
        self._at_once = work.at_once(batch)
        self._range, self._shift = score_range, program.teacher_contract.shift
        self._prompts = Prompts.of(work, program, data, self._at_once)
        self._samples = Samples(self._prompts, program, real, program.teacher_contract)
        self._lagging = False

    def look(self, step: int) -> Mapping[str, float]:
        """The figures of a step."""
        with self._generator.with_average():
            figures = self._samples.figures(step, self._student, self._contract)
        lag, highest = self._lag(), self._work.health.max_critic_lag
        self._lagging = highest is not None and lag > highest
        return {**figures, "critic_lag": lag}

    def again(self, step: int) -> Redraws:
        """The figures of the same weights with other noises; after `look`. The lag only where it is in question."""
        with self._generator.with_average():
            found = [self._samples.redrawn(draw, self._student, self._contract) for draw in range(1, 1 + REDRAWS)]
        if self._lagging:
            found = [{**one, "critic_lag": self._lag(draw)} for draw, one in enumerate(found, start=1)]
        return Redraws(found, self._samples.of_teacher())

    def _lag(self, draw: int = 0) -> float:
        """Of the fake score behind the generator as it is trained, at as many levels as there are samples."""
        _, fresh = self._prompts.sampled(self._student, self._contract, draw)
        total, world = self._prompts.total, self._work.world
        parts = (self._work.seed, "health", "critic lag", *([draw] if draw else []))
        draws = Draws(*parts, batch=total, rank=world.rank, processes=world.size)
        low, high = self._range
        # Which level a sample gets has nothing to do with which of the student's steps predicted it.
        u = (torch.randperm(total, generator=draws.shared)[draws.mine] + 0.5) / total
        level = shift(low + (high - low) * u, self._shift).to(fresh.device)
        noise = draws.normal(*fresh.shape[1:]).to(fresh.device)
        process, given = self._contract.process, self._prompts.given
        return critic_lag(
            self._fake, self._real, process, fresh, given, level, noise, at_once=self._at_once, world=world
        )


def student_watch(work: PassContext, name: str, health: StudentHealth | None) -> Watch:
    """The watch over a distillation; without samples only what its steps report is judged."""
    limits, none = work.health, (None, None)
    low, high = limits.deviation or none
    slow, fast = limits.motion or none
    over_driven = "train for fewer steps, lower learning_rate, or lower inter_cfg and intra_cfg"
    return Watch(
        work,
        name=name,
        look=health.look if health is not None else lambda step: {},
        again=health.again if health is not None else None,
        held_out="sample_distance",
        limits={
            "sample_deviation": Limit(setting="deviation", low=low, high=high, mend=over_driven),
            "sample_motion": Limit(setting="motion", low=slow, high=fast, mend=over_driven),
            "sample_saturation": Limit(setting="max_saturation", high=limits.max_saturation, mend=over_driven),
            "critic_lag": Limit(
                setting="max_critic_lag",
                high=limits.max_critic_lag,
                mend="raise critic_updates or critic_learning_rate, or lower learning_rate",
            ),
            "normaliser_min": Limit(
                setting="min_normaliser",
                low=limits.min_normaliser,
                mend="a sample at the teacher has an exploding gradient: train for fewer steps, or lower inter_cfg",
            ),
        },
    )
