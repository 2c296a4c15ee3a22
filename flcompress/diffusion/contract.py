"""The sampling contract: how a model is meant to be sampled, written once.

It travels with the program and is the only source for training, sampling and export. A schedule written twice drifts
apart, and a student sampled at other noise levels than it was trained on is worse without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flcompress.diffusion.experts import Experts
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

if TYPE_CHECKING:
    from flcompress.diffusion.process import Process

PipelineSigmas = Callable[[int, Mapping[str, Any]], Sequence[float] | None]
"""(Steps, the scheduler's configuration) -> the sigmas that a stock pipeline hands to its scheduler; None if the
scheduler spaces its own."""

_LATER: dict[str, Any] = {"mu": None, "ends": None, "negative_prompt": ""}
"""Fields that the first contracts did not have, omitted at these values: equal contracts stay equal files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingContract:
    """Scheduler, steps and guidance of one model.

    Attributes:
        prediction: what the network predicts: "flow" (the velocity e - x0), "v_prediction" or "epsilon".
        scheduler_class: diffusers class of the scheduler saved with the model: its own, or a few-step student's.
        scheduler: its configuration.
        given_sigmas: what the stock pipeline hands to the scheduler; None if the scheduler spaces its own.
        num_inference_steps: network calls along a sampling path.
        sigmas: the noise level of each call, in order, as that scheduler gives them (without the final 0).
        timesteps: the network's timestep input at each call, as that scheduler gives it.
        guidance_scale: w in u + w (c - u); 1 is none.
        max_sequence_length: tokens that a prompt is padded to.
        embedded_guidance: the scale that a guidance-distilled network (HunyuanVideo, FLUX.1-dev) takes as an input.
        experts: in a pipeline with two transformers, which is called at which level; `guidance_scale` is then the
            high-noise expert's.
        mu: what the stock pipeline hands to a scheduler with dynamic shifting, at the size that is sampled.
        ends: the noise level after each call; None if it is the next call's, and 0 after the last.
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
        """The noising process, which gives a noise level its meaning."""
        return _process(self.scheduler_class, self.prediction, self.scheduler)

    @property
    def stochastic(self) -> bool:
        """Whether each step predicts x0 and adds fresh noise (few-step students) or follows the ODE (Euler)."""
        return self.scheduler_class == FLOW_SCHEDULER and bool(dict(self.scheduler).get("stochastic_sampling", False))

    @property
    def solver(self) -> bool:
        """Whether the saved scheduler uses earlier steps, so that only it can take the next one."""
        return is_solver(self.scheduler_class, dict(self.scheduler))

    @property
    def replaces_steps(self) -> bool:
        """Whether sampling takes other steps between the saved scheduler's levels, since its own add noise."""
        return self.scheduler_class not in ONE_STEP and not self.solver

    @property
    def shift(self) -> float:
        """Timestep shift of a flow model; 1 if the levels are not shifted."""
        return shift_of(self.scheduler_class, dict(self.scheduler), self.mu) if self.prediction == "flow" else 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations for one sample: guidance doubles them."""
        return sum(2 if self.guidance_at(step) != 1.0 else 1 for step in range(len(self.timesteps)))

    @property
    def own_evaluations(self) -> int:
        """Network evaluations of the compressed transformer, which may share the levels with another."""
        return sum(2 if self.guidance_at(step) != 1.0 else 1 for step in self.own_steps)

    @property
    def guided(self) -> bool:
        """Whether any call needs the negative prompt."""
        return self.evaluations > len(self.timesteps)

    def guidance_at(self, step: int) -> float:
        """Return the guidance scale of call number `step`."""
        if self.experts is None or self.experts.at(self.timesteps[step]) == "high":
            return self.guidance_scale
        return self.experts.guidance_scale

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """(noise level before, after) of each call."""
        return tuple(zip(self.sigmas, self.ends or (*self.sigmas[1:], 0.0), strict=True))

    @property
    def own_steps(self) -> tuple[int, ...]:
        """Indices of the calls to the compressed transformer: all, unless it is one of two experts."""
        every = range(len(self.timesteps))
        if (experts := self.experts) is None:
            return tuple(every)
        return tuple(step for step in every if experts.at(self.timesteps[step]) == experts.compressed)

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level at which the compressed transformer is called."""
        return (0.0, 1.0) if self.experts is None else self.experts.levels

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as files keep it."""
        fields = {key: value for key, value in asdict(self).items() if key not in _LATER or value != _LATER[key]}
        return {**fields, "scheduler": dict(self.scheduler), "guidance_convention": "u + w (c - u)"}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> SamplingContract:
        """Read what `to_dict` returned."""
        fields = {key: value for key, value in plain.items() if key != "guidance_convention"}
        fields["scheduler"] = freeze(fields["scheduler"])
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
    """Return the contract of a stock scheduler with this configuration: its own levels, read off, never recomputed.

    Args:
        scheduler_config: the scheduler's configuration in a pipeline folder.
        num_inference_steps: see `SamplingContract`, as for those that follow.
        guidance_scale: w in u + w (c - u).
        max_sequence_length: tokens that a prompt is padded to.
        embedded_guidance: the scale that a guidance-distilled network takes as an input.
        pipeline_sigmas: the sigmas that the stock pipeline hands over.
        mu: the shift of a scheduler with dynamic shifting, at the size that is sampled.
        experts: in a pipeline with two transformers, which is called at which level.
        negative_prompt: what guidance leads away from.

    Raises:
        ModelError: a scheduler of another process, or one that cannot be followed.
    """
    name = str(scheduler_config.get("_class_name", FLOW_SCHEDULER))
    config = {key: value for key, value in scheduler_config.items() if not key.startswith("_")}
    prediction = prediction_of(name, config)
    if prediction == "flow":
        shift_of(name, config, mu)  # raises if the shift depends on the size and the pipeline gives none
    sigmas = pipeline_sigmas(num_inference_steps, config) if pipeline_sigmas else None
    scheduler = scheduler_from(name, config)
    set_timesteps(scheduler, num_inference_steps, sigmas, mu)
    levels = read_levels(scheduler)
    check_levels(scheduler, levels)
    if is_solver(name, config):
        check_steps(scheduler)
    return SamplingContract(
        prediction=prediction,
        scheduler_class=name,
        scheduler=freeze(saved_config(scheduler)),
        num_inference_steps=num_inference_steps,
        sigmas=levels.sigmas,
        timesteps=levels.timesteps,
        guidance_scale=guidance_scale,
        max_sequence_length=max_sequence_length,
        given_sigmas=tuple(map(float, sigmas)) if sigmas is not None else None,
        embedded_guidance=embedded_guidance,
        experts=experts,
        mu=mu,
        ends=levels.odd_ends,
        negative_prompt=negative_prompt,
    )


def scheduler_of(contract: SamplingContract) -> Any:
    """Return the stock scheduler, its timesteps set as the stock pipeline of the model sets them."""
    scheduler = scheduler_from(contract.scheduler_class, dict(contract.scheduler))
    set_levels(scheduler, contract)
    return scheduler


def set_levels(scheduler: Any, contract: SamplingContract) -> None:
    """Set a scheduler's timesteps as the stock pipeline of the model does."""
    set_timesteps(scheduler, contract.num_inference_steps, contract.given_sigmas, contract.mu)


def levels_of(scheduler: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (noise levels, timesteps) of a stock scheduler whose timesteps are set, 1 or T being pure noise."""
    levels = read_levels(scheduler)
    return levels.sigmas, levels.timesteps


def resample(
    contract: SamplingContract, num_inference_steps: int, pipeline_sigmas: PipelineSigmas | None = None
) -> SamplingContract:
    """Return the contract of the same scheduler and guidance in another number of steps."""
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


def freeze(config: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return a scheduler's configuration as a contract holds it: sorted pairs, hashable."""
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in sorted(config.items()))


def from_conditional_convention(scale: float) -> float:
    """Convert a guidance scale written for c + w (c - u), as other projects have it, to u + w (c - u)."""
    return scale + 1.0


@lru_cache(maxsize=32)
def _process(scheduler_class: str, prediction: str, config: tuple[tuple[str, Any], ...]) -> Process:
    from flcompress.diffusion.process import FLOW, Discrete  # torch, which reading a contract does not need

    if prediction == "flow":
        return FLOW
    return Discrete(scheduler_from(scheduler_class, dict(config)).alphas_cumprod, prediction)
