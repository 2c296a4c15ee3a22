"""The sampling contract: how a model is meant to be sampled, written once.

It travels with the program and is the only source for training, sampling and export. A schedule written twice drifts
apart, and a student sampled at other noise levels than it was trained on is worse without any error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flcompress.errors import ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingContract:
    """Scheduler, steps and guidance of one model.

    Attributes:
        prediction: what the network predicts; "flow" is the velocity e - x0.
        scheduler: configuration of diffusers' `FlowMatchEulerDiscreteScheduler`, the one that is saved with the model.
        num_inference_steps: network calls along a sampling path.
        sigmas: the noise level of each call, in order, as that scheduler gives them (without the final 0).
        timesteps: what the network is told at each call: sigma times the number of training timesteps.
        guidance_scale: w in u + w (c - u); 1 is none.
        max_sequence_length: tokens that a prompt is padded to.
    """

    prediction: str = "flow"
    scheduler: tuple[tuple[str, Any], ...]
    num_inference_steps: int
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    guidance_scale: float
    max_sequence_length: int

    @property
    def stochastic(self) -> bool:
        """Whether each step predicts x0 and noises it again (few-step students) or follows the ODE (Euler)."""
        return bool(dict(self.scheduler).get("stochastic_sampling", False))

    @property
    def shift(self) -> float:
        return float(dict(self.scheduler).get("shift", 1.0))

    @property
    def evaluations(self) -> int:
        """Network evaluations for one sample: guidance doubles them."""
        return self.num_inference_steps * (2 if self.guidance_scale != 1.0 else 1)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scheduler": dict(self.scheduler), "guidance_convention": "u + w (c - u)"}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SamplingContract:
        fields = {key: value for key, value in given.items() if key != "guidance_convention"}
        fields["scheduler"] = tuple(sorted(fields["scheduler"].items()))
        fields["sigmas"] = tuple(fields["sigmas"])
        fields["timesteps"] = tuple(fields["timesteps"])
        return cls(**fields)


def contract_of(
    scheduler_config: dict[str, Any], *, num_inference_steps: int, guidance_scale: float, max_sequence_length: int
) -> SamplingContract:
    """The contract that a stock scheduler with this configuration gives: its own sigmas, read off, never recomputed."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = scheduler_config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if name != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"scheduler: {name} given, expected FlowMatchEulerDiscreteScheduler; "
            "save the pipeline with FlowMatchEulerDiscreteScheduler(shift=...) as its scheduler"
        )
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler_config)
    scheduler.set_timesteps(num_inference_steps)
    saved = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return SamplingContract(
        scheduler=tuple(sorted(saved.items())),
        num_inference_steps=num_inference_steps,
        sigmas=tuple(float(s) for s in scheduler.sigmas[:-1]),
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
    )


def student_contract(teacher: SamplingContract, num_inference_steps: int) -> SamplingContract:
    """The few-step contract: levels 1, (N-1)/N ... 1/N under the teacher's shift, no guidance, re-noising sampler.

    A stock scheduler spaces its own levels from 1 down to almost 0 and would all but waste the last call. Stretched to
    `shift_terminal` = T it gives the wanted ones exactly: both maps are Moebius maps fixed at 1, so matching the value
    at 0 and one shift is enough (docs/decisions/0003-student-schedule.md). With N steps, shift K and a = 1/N:

        T = K a / (1 + (K - 1) a)        k = 1 + (1 - a) (K - 1) / (1 + a (K - 1))
    """
    k, a = teacher.shift, 1.0 / num_inference_steps
    config = {
        **dict(teacher.scheduler),
        "shift": 1.0 + (1.0 - a) * (k - 1.0) / (1.0 + a * (k - 1.0)),
        "shift_terminal": k * a / (1.0 + (k - 1.0) * a),
        "stochastic_sampling": True,
    }
    if num_inference_steps == 1:
        config["shift_terminal"] = None  # one call starts, and ends, at pure noise
    return contract_of(
        config,
        num_inference_steps=num_inference_steps,
        guidance_scale=1.0,
        max_sequence_length=teacher.max_sequence_length,
    )
