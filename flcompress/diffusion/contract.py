"""The sampling contract: how a model is meant to be sampled, written once.

It travels with the program and is the only source for training, sampling and export. A schedule written twice drifts
apart, and a student sampled at other noise levels than it was trained on is worse without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from flcompress.diffusion.experts import Experts
from flcompress.diffusion.process import FLOW, Discrete, Process
from flcompress.diffusion.schedulers import (
    FLOW_SCHEDULER,
    ONE_STEP,
    check_levels,
    check_steps,
    is_solver,
    prediction_of,
    read_levels,
    saved_config,
    scheduler_from,
    set_timesteps,
    shift_of,
)

PipelineSigmas = Callable[[int, Mapping[str, Any]], Sequence[float] | None]
"""(Steps, the scheduler's configuration) -> the sigmas that a stock pipeline hands to its scheduler; None where the
scheduler spaces its own."""

_LATER: dict[str, Any] = {"mu": None, "ends": None, "negative_prompt": ""}
"""Fields that the first contracts did not have, left out where they say nothing: equal contracts stay equal files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingContract:
    """Scheduler, steps and guidance of one model.

    Attributes:
        prediction: what the network predicts: "flow" (the velocity e - x0), "v_prediction" or "epsilon".
        scheduler_class: of diffusers, the one that is saved with the model: its own, or a few-step student's.
        scheduler: its configuration.
        given_sigmas: what the stock pipeline hands to the scheduler; None where the scheduler spaces its own.
        num_inference_steps: network calls along a sampling path.
        sigmas: the noise level of each call, in order, as that scheduler gives them (without the final 0).
        timesteps: what the network is told at each call, as that scheduler gives it.
        guidance_scale: w in u + w (c - u); 1 is none.
        max_sequence_length: tokens that a prompt is padded to.
        embedded_guidance: the scale that a guidance-distilled network (HunyuanVideo, FLUX.1-dev) is told as an input.
        experts: of a pipeline with two transformers, who answers for which level; then `guidance_scale` is the
            high-noise one's.
        mu: what the stock pipeline hands to a scheduler with dynamic shifting, at the size that is sampled.
        ends: the noise level after each call, where it is not the next call's and 0 after the last.
        negative_prompt: what guidance leads away from.
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
    mu: float | None = None
    ends: tuple[float, ...] | None = None
    negative_prompt: str = ""

    @property
    def process(self) -> Process:
        """What a noise level means to this model."""
        return _process(self.scheduler_class, self.prediction, self.scheduler)

    @property
    def stochastic(self) -> bool:
        """Whether each step predicts x0 and noises it again (few-step students) or follows the ODE (Euler)."""
        return self.scheduler_class == FLOW_SCHEDULER and bool(dict(self.scheduler).get("stochastic_sampling", False))

    @property
    def solver(self) -> bool:
        """Whether the saved scheduler looks back at earlier steps, so that only itself can take them."""
        return is_solver(self.scheduler_class, dict(self.scheduler))

    @property
    def replaced(self) -> bool:
        """Whether sampling follows the levels of the saved scheduler by other steps, since that one adds noise."""
        return self.scheduler_class not in ONE_STEP and not self.solver

    @property
    def shift(self) -> float:
        """Timestep shift of a flow model; 1 where the levels are not shifted."""
        return shift_of(self.scheduler_class, dict(self.scheduler), self.mu) if self.prediction == "flow" else 1.0

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
        """Whether any call needs the negative prompt."""
        return self.evaluations > len(self.timesteps)

    def guidance_at(self, place: int) -> float:
        """The guidance scale of call number `place`."""
        if self.experts is None or self.experts.at(self.timesteps[place]) == "high":
            return self.guidance_scale
        return self.experts.guidance_scale

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """(noise level before, after) of each call."""
        return tuple(zip(self.sigmas, self.ends or (*self.sigmas[1:], 0.0), strict=True))

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
        told = {key: value for key, value in asdict(self).items() if key not in _LATER or value != _LATER[key]}
        return {**told, "scheduler": dict(self.scheduler), "guidance_convention": "u + w (c - u)"}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> SamplingContract:
        fields = {key: value for key, value in given.items() if key != "guidance_convention"}
        fields["scheduler"] = frozen(fields["scheduler"])
        for name in ("sigmas", "timesteps", "given_sigmas", "ends"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
        if fields.get("experts") is not None:
            fields["experts"] = Experts(**fields["experts"])
        return cls(**fields)


def contract_of(
    scheduler_config: Mapping[str, Any],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    max_sequence_length: int,
    embedded_guidance: float | None = None,
    pipeline_sigmas: PipelineSigmas | None = None,
    mu: float | None = None,
    experts: Experts | None = None,
    negative_prompt: str = "",
) -> SamplingContract:
    """The contract that a stock scheduler with this configuration gives: its own levels, read off, never recomputed.

    Args:
        scheduler_config: of a pipeline folder.
        pipeline_sigmas: the sigmas that the stock pipeline hands over.
        mu: of a scheduler with dynamic shifting, at the size that is sampled.

    Raises:
        ModelError: a scheduler of another process, or one that cannot be followed.
    """
    name = str(scheduler_config.get("_class_name", FLOW_SCHEDULER))
    config = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    prediction = prediction_of(name, config)
    if prediction == "flow":
        shift_of(name, config, mu)  # a shift that depends on the size needs the pipeline to say it
    given = pipeline_sigmas(num_inference_steps, config) if pipeline_sigmas else None
    scheduler = scheduler_from(name, config)
    set_timesteps(scheduler, num_inference_steps, given, mu)
    levels = read_levels(scheduler)
    check_levels(scheduler, levels)
    if is_solver(name, config):
        check_steps(scheduler)
    return SamplingContract(
        prediction=prediction,
        scheduler_class=name,
        scheduler=frozen(saved_config(scheduler)),
        num_inference_steps=num_inference_steps,
        sigmas=levels.sigmas,
        timesteps=levels.timesteps,
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        given_sigmas=tuple(map(float, given)) if given is not None else None,
        embedded_guidance=embedded_guidance,
        experts=experts,
        mu=mu,
        ends=levels.odd_ends,
        negative_prompt=negative_prompt,
    )


def scheduler_of(contract: SamplingContract) -> Any:
    """The stock scheduler, its timesteps set as the stock pipeline of the model sets them."""
    scheduler = scheduler_from(contract.scheduler_class, dict(contract.scheduler))
    set_levels(scheduler, contract)
    return scheduler


def set_levels(scheduler: Any, contract: SamplingContract) -> None:
    """Set a scheduler's timesteps as the stock pipeline of the model does."""
    set_timesteps(scheduler, contract.num_inference_steps, contract.given_sigmas, contract.mu)


def levels_of(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(noise levels, timesteps) of a stock scheduler whose timesteps are set, 1 or T being pure noise."""
    levels = read_levels(scheduler)
    return levels.sigmas, levels.timesteps


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
        mu=contract.mu,
        experts=contract.experts,
        negative_prompt=contract.negative_prompt,
    )


def frozen(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """A scheduler's configuration as a contract holds it."""
    return tuple((key, tuple(one) if isinstance(one, list) else one) for key, one in sorted(config.items()))


@lru_cache(maxsize=32)
def _process(scheduler_class: str, prediction: str, config: tuple[tuple[str, Any], ...]) -> Process:
    if prediction == "flow":
        return FLOW
    return Discrete(scheduler_from(scheduler_class, dict(config)).alphas_cumprod, prediction)
