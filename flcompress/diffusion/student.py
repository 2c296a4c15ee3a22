"""The contract of a few-step student, made from its teacher's."""

from __future__ import annotations

from dataclasses import replace

from flcompress.diffusion.contract import PipelineSigmas, SamplingContract, frozen, resampled
from flcompress.errors import ModelError


def student_contract(
    teacher: SamplingContract, num_inference_steps: int, pipeline_sigmas: PipelineSigmas | None = None
) -> SamplingContract:
    """The few-step contract: levels 1, (N-1)/N ... 1/N under the teacher's shift, no guidance.

    A flow student noises its prediction again at every step, a discrete one, and one whose scheduler counts backwards,
    follows the ODE: those stock schedulers know no other way. A stock flow scheduler spaces its own levels from 1 down
    to almost 0 and would all but waste the last call. Stretched to `shift_terminal` = T it gives the wanted ones
    exactly: both maps are Moebius maps fixed at 1, so matching the value at 0 and one shift is enough
    (docs/decisions/0003-student-schedule.md). With N steps, shift K and a = 1/N:

        T = K a / (1 + (K - 1) a)        k = 1 + (1 - a) (K - 1) / (1 + a (K - 1))

    Where the pipeline hands over the sigmas, they are the wanted ones (or, Mochi's, fixed), and K alone is left.

    Raises:
        ModelError: steps that do not divide the timesteps of a discrete process.
    """
    config = dict(teacher.scheduler)
    given = teacher.given_sigmas
    if teacher.prediction != "flow":
        if config["num_train_timesteps"] % num_inference_steps:
            raise ModelError(
                f"dmd.student_steps: {num_inference_steps} given, expected a divisor of the scheduler's "
                f"{config['num_train_timesteps']} timesteps, such as 4"
            )
    elif given is None:
        k, a = teacher.shift, 1.0 / num_inference_steps
        config |= {
            "shift": 1.0 + (1.0 - a) * (k - 1.0) / (1.0 + a * (k - 1.0)),
            # One call starts, and ends, at pure noise.
            "shift_terminal": k * a / (1.0 + (k - 1.0) * a) if num_inference_steps > 1 else None,
            "stochastic_sampling": True,
        }
    else:
        config |= {"shift_terminal": None, "stochastic_sampling": not config.get("invert_sigmas")}
    unguided = _unguided(replace(teacher, scheduler=frozen(config)))
    student = resampled(unguided, num_inference_steps, pipeline_sigmas)
    _check_experts(student)
    return student


def _unguided(teacher: SamplingContract) -> SamplingContract:
    """Without guidance; a partner that was not distilled keeps its own."""
    if (experts := teacher.experts) is None:
        return replace(teacher, guidance_scale=1.0)
    alone = experts.partner_steps is None
    high = teacher.guidance_scale if alone and experts.compressed == "low" else 1.0
    low = experts.guidance_scale if alone and experts.compressed == "high" else 1.0
    return replace(teacher, guidance_scale=high, experts=replace(experts, guidance_scale=low))


def _check_experts(student: SamplingContract) -> None:
    """ModelError where the compressed expert answers no call, or its partner was distilled for other calls."""
    if (experts := student.experts) is None:
        return
    steps = student.num_inference_steps
    if experts.partner_steps not in (None, steps):
        raise ModelError(
            f"dmd.student_steps: {steps} given, expected {experts.partner_steps}: the partner that model.partner names "
            "was distilled for so many"
        )
    if not student.places:
        told = ", ".join(f"{timestep:.4g}" for timestep in student.timesteps)
        raise ModelError(
            f"dmd.student_steps: {steps} given, but none of its timesteps ({told}) is the {experts.compressed}-noise "
            f"expert's, which answers {'from' if experts.compressed == 'high' else 'below'} {experts.boundary:g}; "
            "give more steps"
        )
