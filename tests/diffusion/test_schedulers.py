"""A contract has the levels of the folder's own scheduler, whatever its class, and sampling takes them one by one."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from flcompress.diffusion.contract import SamplingContract, contract_of, resample, scheduler_of
from flcompress.diffusion.sampling import advance, predict, sample
from flcompress.diffusion.schedulers import DISCRETE_ALIKE, FLOW_SCHEDULER, FLOW_SOLVERS
from flcompress.diffusion.student import student_contract
from flcompress.errors import ModelError

# diffusers hands tensors to numpy in ways that the newest numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
FLOW_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": (FLOW_SCHEDULER, {"shift": 3.0}),
    "euler karras": (FLOW_SCHEDULER, {"shift": 3.0, "use_karras_sigmas": True}),
    "euler exponential": (FLOW_SCHEDULER, {"shift": 3.0, "use_exponential_sigmas": True}),
    "euler beta": (FLOW_SCHEDULER, {"shift": 3.0, "use_beta_sigmas": True}),
    "euler terminal": (FLOW_SCHEDULER, {"shift": 3.0, "shift_terminal": 0.1}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
    "unipc shift 8": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 8.0}),
    "unipc terminal": ("UniPCMultistepScheduler", FLOW | {"shift_terminal": 0.1}),
    "unipc karras": ("UniPCMultistepScheduler", FLOW | {"use_karras_sigmas": True}),
    # As `UniPCMultistepScheduler.from_config` makes it of Euler's: the keys of that one stay behind, without effect.
    "unipc once euler": ("UniPCMultistepScheduler", FLOW | {"shift": 7.0, "stochastic_sampling": True}),
    "dpm": ("DPMSolverMultistepScheduler", FLOW),
    "dpm single": ("DPMSolverSinglestepScheduler", FLOW),
    "deis": ("DEISMultistepScheduler", FLOW),
    "sa": ("SASolverScheduler", FLOW),
}
FIRST_ORDER: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {"solver_order": 1, "disable_corrector": list(range(50))},
    "DPMSolverMultistepScheduler": {"solver_order": 1},
    "DPMSolverSinglestepScheduler": {"solver_order": 1},
    "DEISMultistepScheduler": {"solver_order": 1},
}
"""SASolver adds noise on the way and has no such setting."""


def contract(name: str, config: dict[str, Any], steps: int = 4, **more: Any) -> SamplingContract:
    given = {"_class_name": name, **config}
    return contract_of(given, num_inference_steps=steps, guidance_scale=1.0, max_sequence_length=4, **more)


def stock(name: str, config: dict[str, Any], steps: int, **arguments: Any) -> Any:
    scheduler = getattr(diffusers, name)(**{key: value for key, value in config.items() if key in _known(name)})
    scheduler.set_timesteps(steps, **arguments)
    return scheduler


def _known(name: str) -> set[str]:
    return set(getattr(diffusers, name)().config)


@pytest.mark.parametrize("steps", [4, 7, 50])
@pytest.mark.parametrize("case", FLOW_CASES)
def test_a_flow_contract_has_the_levels_and_timesteps_of_the_folders_scheduler(case: str, steps: int) -> None:
    name, config = FLOW_CASES[case]
    made, theirs = contract(name, config, steps), stock(name, config, steps)
    assert list(made.sigmas) == theirs.sigmas[:-1].tolist()
    assert [after for _, after in made.steps] == theirs.sigmas[1:].tolist()
    assert list(made.timesteps) == theirs.timesteps.tolist()
    assert made.shift == (8.0 if case == "unipc shift 8" else 3.0)
    assert not made.stochastic
    assert SamplingContract.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) == made
    again = scheduler_of(made)
    assert type(again).__name__ == name
    assert again.sigmas.tolist() == theirs.sigmas.tolist()


def test_the_last_of_four_levels_is_the_solvers() -> None:
    """Euler's scheduler would have .009 here, and all but waste its last call."""
    assert contract("UniPCMultistepScheduler", FLOW).sigmas[-1] == pytest.approx(0.501, abs=1e-3)
    assert contract(FLOW_SCHEDULER, {"shift": 3.0}).sigmas[-1] == pytest.approx(0.009, abs=1e-3)


class Recording:
    """A network of a known formula, and what it was told."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, given: object = None) -> torch.Tensor:
        self.told.append(float(t[0]))
        return torch.tanh(x) + t.reshape(-1, 1, 1, 1, 1) / 1000.0


def noise(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)


def walked(scheduler: Any, network: Recording, x: torch.Tensor) -> torch.Tensor:
    """What a stock pipeline's loop makes of `x`."""
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.expand(2)), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("case", [case for case in FLOW_CASES if case != "sa"])
def test_sampling_takes_the_steps_of_the_folders_scheduler(case: str, steps: int) -> None:
    name, config = FLOW_CASES[case]
    ours, theirs = Recording(), Recording()
    made = sample(ours, contract(name, config, steps), noise(), {})
    torch.testing.assert_close(made, walked(stock(name, config, steps), theirs, noise()), atol=1e-5, rtol=1e-5)
    assert ours.told == theirs.told


@pytest.mark.parametrize("case", [case for case, (name, _) in FLOW_CASES.items() if name in FIRST_ORDER])
def test_a_solver_of_first_order_takes_the_steps_of_its_ode(case: str) -> None:
    """So its levels are what they are taken for: where noise and clip are mixed, and what the network is told."""
    name, config = FLOW_CASES[case]
    made = contract(name, config, 6)
    theirs = stock(name, config | FIRST_ORDER[name], 6)
    theirs.sigmas = theirs.sigmas.double()  # DEIS divides by 1 - sigma, which is 3e-4 at first
    x, network, unused = noise(torch.float64), Recording(), torch.randn_like
    for place in range(6):
        x = advance(made, x, predict(network, made, place, x, {}, None), place, unused)
    torch.testing.assert_close(x, walked(theirs, Recording(), noise(torch.float64)), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("more", [{"algorithm_type": "sde-dpmsolver++"}, {"_class_name": "SASolverScheduler"}])
def test_a_solver_that_adds_noise_is_followed_along_its_ode(more: dict[str, Any]) -> None:
    given = {"_class_name": "DPMSolverMultistepScheduler", **FLOW, **more}
    made = contract_of(given, num_inference_steps=6, guidance_scale=1.0, max_sequence_length=4)
    assert made.replaces_steps
    assert not made.stochastic
    once, again = (sample(Recording(), made, noise(), {}) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("steps", [4, 6, 7, 50])
@pytest.mark.parametrize("spacing", [{"timestep_spacing": "leading", "steps_offset": 1}, "linspace", "trailing"])
@pytest.mark.parametrize("more", [{}, {"set_alpha_to_one": False, "rescale_betas_zero_snr": False}])
def test_a_discrete_contract_has_the_spacing_of_the_folders_scheduler(
    spacing: dict[str, Any] | str, steps: int, more: dict[str, Any]
) -> None:
    config = COGVIDEOX | (spacing if isinstance(spacing, dict) else {"timestep_spacing": spacing}) | more
    theirs = stock("CogVideoXDDIMScheduler", config, steps)
    x = walked(theirs, Recording(), noise())
    for name in DISCRETE_ALIKE:
        made = contract(name, config, steps)
        assert made.scheduler_class == name
        assert list(made.timesteps) == theirs.timesteps.tolist()
        torch.testing.assert_close(sample(Recording(), made, noise(), {}), x.float(), atol=1e-5, rtol=1e-5)


DYNAMIC = {"use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (FLOW_SCHEDULER, DYNAMIC),
        (FLOW_SCHEDULER, DYNAMIC | {"time_shift_type": "linear"}),
        ("UniPCMultistepScheduler", FLOW | DYNAMIC),
        ("DPMSolverMultistepScheduler", FLOW | DYNAMIC),
    ],
)
def test_a_shift_that_depends_on_the_size_is_the_folders_own(name: str, config: dict[str, Any]) -> None:
    made = contract(name, config, mu=0.7)
    theirs = stock(name, config, 4, mu=0.7)
    assert list(made.sigmas) == theirs.sigmas[:-1].tolist()
    assert made.shift == pytest.approx(0.7 if config.get("time_shift_type") else 2.01375, abs=1e-5)
    assert resample(made, 9).sigmas == contract(name, config, 9, mu=0.7).sigmas
    assert SamplingContract.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    student = student_contract(made, 4)
    assert student.mu is None
    assert student.sigmas == student_contract(contract(FLOW_SCHEDULER, {"shift": made.shift}), 4).sigmas


@pytest.mark.parametrize("case", FLOW_CASES)
def test_a_student_starts_at_pure_noise_under_the_right_shift(case: str) -> None:
    name, config = FLOW_CASES[case]
    student = student_contract(contract(name, config, 50), 4)
    k = 8.0 if case == "unipc shift 8" else 3.0
    assert student.scheduler_class == FLOW_SCHEDULER
    assert student.sigmas[0] == 1.0
    assert student.timesteps[0] == 1000.0
    assert student.sigmas == pytest.approx([k * s / (1 + (k - 1) * s) for s in (1.0, 0.75, 0.5, 0.25)], abs=3e-3)
    assert student.ends is None
    assert student.stochastic
    assert SamplingContract.from_dict(json.loads(json.dumps(student.to_dict()))) == student


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_discrete_student_starts_at_pure_noise_whatever_the_teachers_spacing(spacing: str) -> None:
    student = student_contract(contract("CogVideoXDPMScheduler", COGVIDEOX | {"timestep_spacing": spacing}, 50), 4)
    assert student.scheduler_class == "CogVideoXDDIMScheduler"
    assert student.timesteps == (999.0, 749.0, 499.0, 249.0)


def test_levels_that_the_pipeline_hands_over_go_to_a_solver_too() -> None:
    def evenly(steps: int, scheduler: object) -> list[float]:
        return [(steps - place) / steps for place in range(steps)]

    made = contract("UniPCMultistepScheduler", FLOW, pipeline_sigmas=evenly)
    theirs = diffusers.UniPCMultistepScheduler(**FLOW)
    theirs.set_timesteps(sigmas=np.array(evenly(4, None)))
    assert list(made.sigmas) == theirs.sigmas[:-1].tolist()
    with pytest.raises(ModelError, match="DEISMultistepScheduler given, but this pipeline hands its scheduler"):
        contract("DEISMultistepScheduler", FLOW, pipeline_sigmas=evenly)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}, "FlowMatchHeunDiscreteScheduler given, expected"),
        ("UniPCMultistepScheduler", {}, "use_flow_sigmas False and prediction_type epsilon"),
        ("DPMSolverMultistepScheduler", FLOW | {"prediction_type": "epsilon"}, "prediction_type epsilon"),
        ("UniPCMultistepScheduler", FLOW | {"thresholding": True}, "thresholding is set"),
        ("UniPCMultistepScheduler", FLOW | {"num_train_timesteps": 500}, "num_train_timesteps 500 given"),
        ("DPMSolverMultistepScheduler", FLOW | {"use_karras_sigmas": True}, "has the noise levels"),
        ("UniPCMultistepScheduler", FLOW | {"use_beta_sigmas": True}, "has the noise levels"),
        ("UniPCMultistepScheduler", FLOW | {"final_sigmas_type": "none"}, "cannot be set to 4 steps"),
        ("UniPCMultistepScheduler", FLOW | {"predict_x0": False}, "cannot take its steps"),
        ("UniPCMultistepScheduler", FLOW | {"lower_order_final": False}, "ends at values that are not finite"),
        ("UniPCMultistepScheduler", FLOW | {"lower_order_final": False, "solver_order": 3}, "cannot take its steps"),
        (FLOW_SCHEDULER, {"use_beta_sigmas": True, "use_karras_sigmas": True}, "cannot be made from"),
        (FLOW_SCHEDULER, DYNAMIC, "gives it no mu; set shift instead"),
        ("UniPCMultistepScheduler", FLOW | DYNAMIC, "gives it no mu; set flow_shift instead"),
        ("CogVideoXDDIMScheduler", {"prediction_type": "sample"}, "prediction_type sample given"),
        ("CogVideoXDDIMScheduler", {"timestep_spacing": "even"}, "cannot be set to 4 steps"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_one_line(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as found:
        contract(name, config)
    assert "\n" not in str(found.value)


def test_a_discrete_student_needs_something_to_start_from() -> None:
    teacher = contract("CogVideoXDDIMScheduler", {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, 50)
    with pytest.raises(ModelError, match="rescale_betas_zero_snr is set with prediction_type epsilon"):
        student_contract(teacher, 4)


def test_contracts_of_before_are_read_and_written_as_they_were() -> None:
    old = {
        "prediction": "flow",
        "scheduler_class": FLOW_SCHEDULER,
        "scheduler": {"shift": 3.0},
        "num_inference_steps": 2,
        "sigmas": [1.0, 0.5],
        "timesteps": [1000.0, 500.0],
        "guidance_scale": 4.0,
        "max_sequence_length": 16,
        "given_sigmas": None,
        "embedded_guidance": None,
        "experts": None,
        "guidance_convention": "u + w (c - u)",
    }
    read = SamplingContract.from_dict(old)
    assert read.steps == ((1.0, 0.5), (0.5, 0.0))
    assert read.negative_prompt == ""
    assert json.loads(json.dumps(read.to_dict())) == old


def test_every_solver_is_tried() -> None:
    assert {name for name, _ in FLOW_CASES.values()} == {FLOW_SCHEDULER, *FLOW_SOLVERS}
