"""The contract of a few-step student, derived from its teacher's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flcompress.diffusion.contract import PipelineSigmas, SamplingContract, freeze, resample
from flcompress.diffusion.schedulers import DISCRETE_SCHEDULER, FLOW_SCHEDULER
from flcompress.errors import ModelError

OTHER_SPACINGS = ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def student_contract(
    teacher: SamplingContract,
    num_inference_steps: int,
    pipeline_sigmas: PipelineSigmas | None = None,
    *,
    by: str = "dmd",
) -> SamplingContract:
    """Return the few-step contract: levels 1, (N-1)/N ... 1/N under the teacher's shift, no guidance.

    A flow student adds fresh noise to its prediction at every step; a discrete one, and one whose scheduler counts
    backwards, follows the ODE: those stock schedulers know no other way. A stock flow scheduler spaces its own levels
    from 1 down to almost 0 and would all but waste the last call. Stretched to `shift_terminal` = T it gives the wanted
    ones exactly: both maps are Moebius maps fixed at 1, so matching the value at 0 and one shift is enough
    (docs/decisions/0003-student-schedule.md). With N steps, shift K and a = 1/N:

        T = K a / (1 + (K - 1) a)        k = 1 + (1 - a) (K - 1) / (1 + a (K - 1))

    Where the pipeline hands over the sigmas, they are the wanted ones (or, Mochi's, fixed), and K alone is left.

    Args:
        teacher: the model's own contract.
        num_inference_steps: the student's.
        pipeline_sigmas: the sigmas that the stock pipeline hands over.
        by: name of the pass that asks, for errors.

    Raises:
        ModelError: steps that do not divide the timesteps of a discrete process.
    """
    if teacher.prediction != "flow":
        name, config = DISCRETE_SCHEDULER, _discrete(teacher, num_inference_steps, by)
    else:
        name, config = FLOW_SCHEDULER, _flow(teacher, num_inference_steps, pipeline_sigmas)
    unguided = _without_guidance(replace(teacher, scheduler_class=name, scheduler=freeze(config), mu=None))
    student = resample(unguided, num_inference_steps, pipeline_sigmas)
    _check_experts(student, by)
    return student if student.guided else replace(student, negative_prompt="")


def _discrete(teacher: SamplingContract, num_inference_steps: int, by: str) -> dict[str, Any]:
    """Return the scheduler that starts at the last timestep, pure noise, whatever the teacher's spacing."""
    config = dict(teacher.scheduler)
    if config["num_train_timesteps"] % num_inference_steps:
        raise ModelError(
            f"{by}.student_steps: {num_inference_steps} given, expected a divisor of the scheduler's "
            f"{config['num_train_timesteps']} timesteps, such as 4"
        )
    if teacher.prediction == "epsilon" and config["rescale_betas_zero_snr"]:
        raise ModelError(
            "scheduler: rescale_betas_zero_snr is set with prediction_type epsilon, expected v_prediction: a student "
            "starts at pure noise, of which the noise says nothing about a clip"
        )
    return {**config, "timestep_spacing": "trailing"}


def _flow(teacher: SamplingContract, steps: int, pipeline_sigmas: PipelineSigmas | None) -> dict[str, Any]:
    """Return Euler's scheduler with the wanted levels; the teacher's options of other spacings are off."""
    config_of_teacher = dict(teacher.scheduler) if teacher.scheduler_class == FLOW_SCHEDULER else {}
    config: dict[str, Any] = {**config_of_teacher, **dict.fromkeys(OTHER_SPACINGS, False)}
    k, a = teacher.shift, 1.0 / steps
    if pipeline_sigmas is not None and pipeline_sigmas(steps, config) is not None:
        return config | {"shift": k, "shift_terminal": None, "stochastic_sampling": not config.get("invert_sigmas")}
    return config | {
        "shift": 1.0 + (1.0 - a) * (k - 1.0) / (1.0 + a * (k - 1.0)),
        # One call starts, and ends, at pure noise.
        "shift_terminal": k * a / (1.0 + (k - 1.0) * a) if steps > 1 else None,
        "stochastic_sampling": True,
    }


def _without_guidance(teacher: SamplingContract) -> SamplingContract:
    """Return the contract without guidance; a partner that was not distilled keeps its own."""
    if (experts := teacher.experts) is None:
        return replace(teacher, guidance_scale=1.0)
    alone = experts.partner_steps is None
    high = teacher.guidance_scale if alone and experts.compressed == "low" else 1.0
    low = experts.guidance_scale if alone and experts.compressed == "high" else 1.0
    return replace(teacher, guidance_scale=high, experts=replace(experts, guidance_scale=low))


def _check_experts(student: SamplingContract, by: str) -> None:
    """Raise ModelError if the compressed expert is never called, or its partner was distilled for other steps."""
    if (experts := student.experts) is None:
        return
    steps = student.num_inference_steps
    if experts.partner_steps not in (None, steps):
        raise ModelError(
            f"{by}.student_steps: {steps} given, expected {experts.partner_steps}: the partner that model.partner "
            "names was distilled for that many"
        )
    if not student.own_steps:
        timesteps = ", ".join(f"{timestep:.4g}" for timestep in student.timesteps)
        raise ModelError(
            f"{by}.student_steps: {steps} given, but none of its timesteps ({timesteps}) is the "
            f"{experts.compressed}-noise expert's, which answers "
            f"{'from' if experts.compressed == 'high' else 'below'} {experts.boundary:g}; give more steps"
        )
