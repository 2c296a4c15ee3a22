"""Stock schedulers of higher order turned into their own first order, whose steps sampling here takes."""

from __future__ import annotations

from typing import Any

from flcompress.diffusion.contract import SamplingContract, set_levels
from flcompress.diffusion.schedulers import DISCRETE_SCHEDULER

FIRST_ORDER: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {"solver_order": 1, "disable_corrector": list(range(50))},
    "DPMSolverMultistepScheduler": {"solver_order": 1},
    "DPMSolverSinglestepScheduler": {"solver_order": 1},
    "DEISMultistepScheduler": {"solver_order": 1},
}
"""SASolver adds noise on the way and has no such setting."""


def first_order_scheduler(contract: SamplingContract) -> Any:
    """The contract's scheduler, at its levels, of first order; of CogVideoX's two the one without noise."""
    import diffusers

    name = DISCRETE_SCHEDULER if contract.scheduler_class == "CogVideoXDPMScheduler" else contract.scheduler_class
    config = dict(contract.scheduler) | FIRST_ORDER.get(name, {})
    scheduler = getattr(diffusers, name).from_config(config)
    set_levels(scheduler, contract)
    return scheduler
