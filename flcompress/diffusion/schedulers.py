"""Stock schedulers: which are supported, which process they follow, and their noise levels.

Levels are read off the scheduler object after the call that the stock pipeline makes, never recomputed: the classes
space them in ways of their own (the last of 4 levels under shift 3 is .009 for Euler's and .501 for UniPC's).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from flcompress.errors import ModelError

NUM_TRAIN_TIMESTEPS = 1000

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FLOW_SOLVERS = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
"""Solvers of higher order that can follow a flow."""
DISCRETE_SCHEDULER = "CogVideoXDDIMScheduler"
DISCRETE_ALIKE = (DISCRETE_SCHEDULER, "CogVideoXDPMScheduler")
"""Stock schedulers of one process; the first follows its ODE step by step."""
ONE_STEP = (FLOW_SCHEDULER, DISCRETE_SCHEDULER)
"""Schedulers whose steps do not depend on earlier steps."""

_ROUNDING = 1e-6
"""Euler's scheduler shifts in fp32 and can start at 1.0000001."""
_REFUSALS = (
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    ImportError,
    IndexError,
    RuntimeError,
)
"""What stock schedulers raise for a configuration that they cannot follow."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Where a scheduler's steps start and end, 1 being pure noise.

    Attributes:
        sigmas: the noise level of each call.
        timesteps: the network's timestep input at each call.
        ends: the noise level after each call; the next one and 0 for most schedulers.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def odd_ends(self) -> tuple[float, ...] | None:
        """`ends`; None where each step ends at the next level and the last one at 0."""
        return None if self.ends == (*self.sigmas[1:], 0.0) else self.ends


def prediction_of(name: str, config: Mapping[str, Any]) -> str:
    """Return what a network under this scheduler predicts: "flow", "v_prediction" or "epsilon".

    Raises:
        ModelError: a scheduler, or a setting of one, that is not followed.
    """
    prediction = str(config.get("prediction_type", "epsilon"))
    if config.get("thresholding"):
        raise ModelError(f"scheduler: thresholding is set for {name}, expected false: it is meant for pixels")
    if name in DISCRETE_ALIKE:
        if prediction not in ("v_prediction", "epsilon"):
            raise ModelError(
                f"scheduler: prediction_type {prediction} given for {name}, expected v_prediction or epsilon"
            )
        return prediction
    solver = name in FLOW_SOLVERS and config.get("use_flow_sigmas") and prediction == "flow_prediction"
    if name != FLOW_SCHEDULER and not solver:
        settings = (
            f" with use_flow_sigmas {config.get('use_flow_sigmas', False)} and prediction_type {prediction}"
            if name in FLOW_SOLVERS
            else ""
        )
        raise ModelError(
            f"scheduler: {name} given{settings}, expected {FLOW_SCHEDULER}, a solver with flow sigmas "
            f"({', '.join(FLOW_SOLVERS)} with use_flow_sigmas true and prediction_type flow_prediction), or "
            f"{' or '.join(DISCRETE_ALIKE)}; save the pipeline with one of them as its scheduler"
        )
    timesteps = config.get("num_train_timesteps", NUM_TRAIN_TIMESTEPS)
    if timesteps != NUM_TRAIN_TIMESTEPS:
        raise ModelError(
            f"scheduler: num_train_timesteps {timesteps} given for {name}, expected {NUM_TRAIN_TIMESTEPS}: the "
            "network of a flow model takes its noise level times that"
        )
    return "flow"


def is_solver(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a scheduler looks back at earlier steps and adds no noise on the way."""
    noisy = name == "SASolverScheduler" or str(config.get("algorithm_type", "")).startswith("sde")
    return name in FLOW_SOLVERS and not noisy


def shift_of(name: str, config: Mapping[str, Any], mu: float | None) -> float:
    """The timestep shift of a flow scheduler, also of one whose shift depends on the size (`mu`)."""
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ModelError(
                "scheduler: use_dynamic_shifting is set, but this pipeline gives it no mu; set "
                f"{'shift' if name == FLOW_SCHEDULER else 'flow_shift'} instead"
            )
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    return float(config.get("shift" if name == FLOW_SCHEDULER else "flow_shift", 1.0))


def scheduler_from(name: str, config: Mapping[str, Any]) -> Any:
    """Return the stock scheduler of a class and a configuration; raise ModelError if the class refuses it."""
    import diffusers

    try:
        return getattr(diffusers, name).from_config(dict(config))
    except _REFUSALS as error:
        raise ModelError(f"scheduler: {name} cannot be made from its configuration: {error}") from error


def saved_config(scheduler: Any) -> dict[str, Any]:
    """Return a stock scheduler's whole configuration, without values that JSON cannot express.

    Those are infinities, the default of classes that clip at a level, for no clipping.
    """
    endless = {key for key, value in scheduler.config.items() if isinstance(value, float) and math.isinf(value)}
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_") and key not in endless}


def set_timesteps(scheduler: Any, steps: int, given_sigmas: Sequence[float] | None, mu: float | None) -> None:
    """Set a scheduler's timesteps with the arguments that the stock pipeline of the model gives.

    Raises:
        ModelError: the scheduler does not take them, so the stock pipeline cannot be run with it.
    """
    import numpy as np

    name, arguments = type(scheduler).__name__, {} if mu is None else {"mu": mu}
    if given_sigmas is not None and "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ModelError(
            f"scheduler: {name} given, but this pipeline hands its scheduler the noise levels, which {name} does not "
            f"take; expected {FLOW_SCHEDULER}"
        )
    try:
        if given_sigmas is None:
            scheduler.set_timesteps(steps, **arguments)
        else:
            scheduler.set_timesteps(sigmas=np.array(given_sigmas), **arguments)
    except _REFUSALS as error:
        raise ModelError(f"scheduler: {name} cannot be set to {steps} steps: {error}") from error


def read_levels(scheduler: Any) -> Levels:
    """Return the levels of a stock scheduler whose timesteps are set."""
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    if type(scheduler).__name__ in DISCRETE_ALIKE:
        return _discrete_levels(scheduler, timesteps)
    path = tuple(float(s) for s in scheduler.sigmas)
    if type(scheduler).__name__ == FLOW_SCHEDULER and scheduler.config.invert_sigmas:  # Mochi counts from noise to data
        path = tuple(1.0 - s for s in path)
        timesteps = tuple(s * scheduler.config.num_train_timesteps for s in path[:-1])
    return Levels(path[:-1], timesteps, path[1:])


def check_levels(scheduler: Any, levels: Levels) -> None:
    """Raise ModelError unless the levels fall from 1 towards 0, one per call."""
    sigmas = levels.sigmas
    falling = all(before > after for before, after in pairwise(sigmas))
    if not falling or not 0.0 < sigmas[-1] <= sigmas[0] < 1.0 + _ROUNDING or len(sigmas) != len(levels.timesteps):
        shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:4])
        raise ModelError(
            f"scheduler: {type(scheduler).__name__} has the noise levels {shown}{', ...' if len(sigmas) > 4 else ''}, "
            "expected ones that fall from 1 towards 0, one a step; leave out use_karras_sigmas, "
            "use_exponential_sigmas, use_beta_sigmas and use_lu_lambdas, which this class spaces for another process"
        )


def check_steps(scheduler: Any) -> None:
    """Raise ModelError unless a solver whose timesteps are set can walk to the end, where this leaves it."""
    import torch

    x = torch.zeros(1, 1, 1, 1, 1)
    scheduler.set_begin_index(0)
    name = type(scheduler).__name__
    try:
        for timestep in scheduler.timesteps:
            x = scheduler.step(x, timestep, x, return_dict=False)[0]
    except _REFUSALS as error:
        raise ModelError(f"scheduler: {name} cannot take its steps with this configuration: {error}") from error
    if not bool(x.isfinite().all()):
        raise ModelError(
            f"scheduler: {name} ends at values that are not finite with this configuration; leave out solver_order, "
            "lower_order_final and final_sigmas_type"
        )


def _discrete_levels(scheduler: Any, timesteps: tuple[float, ...]) -> Levels:
    """Return the levels of CogVideoX: a step goes back by a fixed number of timesteps, wherever the next call is."""
    count = scheduler.config.num_train_timesteps
    back = count // scheduler.num_inference_steps
    clean = 0.0 if scheduler.config.set_alpha_to_one else 1.0 / count
    before = [t - back for t in timesteps]
    ends = tuple((t + 1.0) / count if t >= 0 else clean for t in before)
    return Levels(tuple((t + 1.0) / count for t in timesteps), timesteps, ends)
