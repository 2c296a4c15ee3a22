"""The sampling contract: how a model is meant to be sampled, written once.

It travels with the program and is the only source for training, sampling and export. A schedule written twice drifts
apart, and a student sampled at other noise levels than it was trained on is worse without any error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from flcompress.diffusion.experts import Experts
from flcompress.diffusion.process import FLOW, Discrete, Process
from flcompress.errors import ModelError

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
DISCRETE_SCHEDULER = "CogVideoXDDIMScheduler"
DISCRETE_ALIKE = (DISCRETE_SCHEDULER, "CogVideoXDPMScheduler")
"""Stock schedulers of one and the same process; the first is the one that follows its ODE step by step."""

PipelineSigmas = Callable[[int], Sequence[float] | None]
"""Steps -> the sigmas that a stock pipeline hands to its scheduler; None where the scheduler spaces its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingContract:
    """Scheduler, steps and guidance of one model.

    Attributes:
        prediction: what the network predicts: "flow" (the velocity e - x0), "v_prediction" or "epsilon".
        scheduler_class: of diffusers, the one that is saved with the model.
        scheduler: its configuration.
        given_sigmas: what the stock pipeline hands to the scheduler; None where the scheduler spaces its own.
        num_inference_steps: network calls along a sampling path.
        sigmas: the noise level of each call, in order, as that scheduler gives them (without the final 0).
        timesteps: what the network is told at each call: sigma times the number of training timesteps.
        guidance_scale: w in u + w (c - u); 1 is none.
        max_sequence_length: tokens that a prompt is padded to.
        embedded_guidance: the scale that a guidance-distilled network (HunyuanVideo, FLUX.1-dev) is told as an input.
        experts: of a pipeline with two transformers, who answers for which level; then `guidance_scale` is the
            high-noise one's.
    """

    prediction: str = "flow"
    scheduler_class: str = FLOW_SCHEDULER
    scheduler: tuple[tuple[str, Any], ...]
    num_inference_steps: int
    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    guidance_scale: float
    max_sequence_length: int
    given_sigmas: tuple[float, ...] | None = None
    embedded_guidance: float | None = None
    experts: Experts | None = None

    @property
    def process(self) -> Process:
        """What a noise level means to this model."""
        return _process(self.scheduler_class, self.prediction, self.scheduler)

    @property
    def stochastic(self) -> bool:
        """Whether each step predicts x0 and noises it again (few-step students) or follows the ODE (Euler)."""
        return bool(dict(self.scheduler).get("stochastic_sampling", False))

    @property
    def shift(self) -> float:
        """Timestep shift of a flow model; 1 where the levels are not shifted."""
        return float(dict(self.scheduler).get("shift", 1.0)) if self.prediction == "flow" else 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations for one sample: guidance doubles them."""
        return sum(2 if self.guidance_at(place) != 1.0 else 1 for place in range(len(self.timesteps)))

    @property
    def own_evaluations(self) -> int:
        """Those of the compressed transformer, where it shares the levels with another."""
        return sum(2 if self.guidance_at(place) != 1.0 else 1 for place in self.places)

    @property
    def guided(self) -> bool:
        """Whether any call needs the empty prompt."""
        return self.evaluations > len(self.timesteps)

    def guidance_at(self, place: int) -> float:
        """The guidance scale of call number `place`."""
        if self.experts is None or self.experts.at(self.timesteps[place]) == "high":
            return self.guidance_scale
        return self.experts.guidance_scale

    @property
    def places(self) -> tuple[int, ...]:
        """Numbers of the calls that the compressed transformer answers: all, but for one of two experts."""
        every = range(len(self.timesteps))
        if (experts := self.experts) is None:
            return tuple(every)
        return tuple(place for place in every if experts.at(self.timesteps[place]) == experts.compressed)

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level that the compressed transformer is responsible for."""
        return (0.0, 1.0) if self.experts is None else self.experts.levels

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scheduler": dict(self.scheduler), "guidance_convention": "u + w (c - u)"}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SamplingContract:
        fields = {key: value for key, value in given.items() if key != "guidance_convention"}
        fields["scheduler"] = frozen(fields["scheduler"])
        for name in ("sigmas", "timesteps", "given_sigmas"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        if fields.get("experts") is not None:
            fields["experts"] = Experts(**fields["experts"])
        return cls(**fields)


def contract_of(
    scheduler_config: dict[str, Any],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    max_sequence_length: int,
    embedded_guidance: float | None = None,
    pipeline_sigmas: PipelineSigmas | None = None,
    mu: float | None = None,
    experts: Experts | None = None,
) -> SamplingContract:
    """The contract that a stock scheduler with this configuration gives: its own levels, read off, never recomputed.

    Args:
        scheduler_config: of a pipeline folder. A multistep solver of the same process is replaced by the one-step
            scheduler (Euler, DDIM) whose path it approximates.
        pipeline_sigmas: the sigmas that the stock pipeline hands over.
        mu: of a scheduler with dynamic shifting, at the size that is sampled; fixed from here on.

    Raises:
        ModelError: a scheduler of another process.
    """
    name, config = _one_step(scheduler_config, mu)
    given = pipeline_sigmas(num_inference_steps) if pipeline_sigmas else None
    contract = SamplingContract(
        prediction="flow" if name == FLOW_SCHEDULER else str(config.get("prediction_type", "epsilon")),
        scheduler_class=name,
        scheduler=frozen(config),
        num_inference_steps=num_inference_steps,
        sigmas=(),
        timesteps=(),
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        given_sigmas=tuple(map(float, given)) if given is not None else None,
        embedded_guidance=embedded_guidance,
        experts=experts,
    )
    scheduler = scheduler_of(contract)
    saved = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    sigmas, timesteps = levels_of(scheduler)
    return replace(contract, scheduler=frozen(saved), sigmas=sigmas, timesteps=timesteps)


def scheduler_of(contract: SamplingContract) -> Any:
    """The stock scheduler, its timesteps set as the stock pipeline of the model sets them."""
    import diffusers

    scheduler = getattr(diffusers, contract.scheduler_class).from_config(dict(contract.scheduler))
    set_levels(scheduler, contract)
    return scheduler


def set_levels(scheduler: Any, contract: SamplingContract) -> None:
    """Set a scheduler's timesteps as the stock pipeline of the model does."""
    if contract.given_sigmas is None:
        scheduler.set_timesteps(contract.num_inference_steps)
    else:
        scheduler.set_timesteps(sigmas=list(contract.given_sigmas))


def levels_of(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(noise levels, timesteps) of a stock scheduler whose timesteps are set, 1 or T being pure noise."""
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    if not hasattr(scheduler, "sigmas"):
        count = scheduler.config.num_train_timesteps
        return tuple((t + 1.0) / count for t in timesteps), timesteps
    sigmas = tuple(float(s) for s in scheduler.sigmas[:-1])
    if scheduler.config.get("invert_sigmas"):  # Mochi counts from noise to data
        sigmas = tuple(1.0 - s for s in sigmas)
        timesteps = tuple(s * scheduler.config.num_train_timesteps for s in sigmas)
    return sigmas, timesteps


def resampled(
    contract: SamplingContract, num_inference_steps: int, pipeline_sigmas: PipelineSigmas | None = None
) -> SamplingContract:
    """The same scheduler and guidance in another number of steps."""
    return contract_of(
        {**dict(contract.scheduler), "_class_name": contract.scheduler_class},
        num_inference_steps=num_inference_steps,
        guidance_scale=contract.guidance_scale,
        max_sequence_length=contract.max_sequence_length,
        embedded_guidance=contract.embedded_guidance,
        pipeline_sigmas=pipeline_sigmas,
        experts=contract.experts,
    )


def _one_step(given: dict[str, Any], mu: float | None) -> tuple[str, dict[str, Any]]:
    """(class, configuration) of the one-step scheduler of the same process, with a fixed shift."""
    name = given.get("_class_name", FLOW_SCHEDULER)
    config = {key: value for key, value in given.items() if not key.startswith("_")}
    if name in DISCRETE_ALIKE:
        # From pure noise on, evenly: the other spacings never see the last timestep.
        return DISCRETE_SCHEDULER, {**config, "timestep_spacing": "trailing"}
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return FLOW_SCHEDULER, {"shift": config.get("flow_shift", 1.0)}
    if name != FLOW_SCHEDULER:
        raise ModelError(
            f"scheduler: {name} given, expected {FLOW_SCHEDULER}, a solver with flow sigmas, or "
            f"{' or '.join(DISCRETE_ALIKE)}; save the pipeline with one of them as its scheduler"
        )
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ModelError(
                "scheduler: use_dynamic_shifting is set, but this pipeline gives it no mu; set shift instead"
            )
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        config |= {"use_dynamic_shifting": False, "shift": math.exp(mu) if exponential else mu}
    return FLOW_SCHEDULER, config


def frozen(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A scheduler's configuration as a contract holds it."""
    return tuple((key, tuple(one) if isinstance(one, list) else one) for key, one in sorted(config.items()))


@lru_cache(maxsize=32)
def _process(scheduler_class: str, prediction: str, config: tuple[tuple[str, Any], ...]) -> Process:
    if prediction == "flow":
        return FLOW
    import diffusers

    scheduler = getattr(diffusers, scheduler_class).from_config(dict(config))
    return Discrete(scheduler.alphas_cumprod, prediction)
