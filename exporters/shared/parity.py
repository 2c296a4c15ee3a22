"""The comparison that every exported denoiser has to pass: the same inputs through torch and through the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flcompress.errors import PostconditionError
from flcompress.runtime.inputs import Arguments, tensors_of
from flcompress.runtime.sizes import Size

Inputs = Mapping[str, torch.Tensor]
"""A transformer's forward arguments that are tensors, by name; see `flcompress.runtime.inputs.tensors_of`."""

Denoiser = Callable[[Inputs], torch.Tensor]

TIMESTEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What a comparison found.

    Attributes:
        difference: largest absolute difference over all cases.
        magnitude: largest absolute value of the reference, to judge the difference by.
        tolerance: what the recipe allows.
        cases: how many inputs were compared.
    """

    difference: float
    magnitude: float
    tolerance: float
    cases: int

    def require(self, what: str, mend: str) -> Parity:
        """Itself, or PostconditionError where the difference is above the tolerance or not a number."""
        if self.difference <= self.tolerance:
            return self
        raise PostconditionError(
            f"{what}: differs from torch by {self.difference:.3g} at most, over {self.cases} cases "
            f"(values up to {self.magnitude:.3g}); expected at most {self.tolerance:g}; {mend}"
        )


def cases(make: Arguments, timesteps: Sequence[float], sizes: Sequence[Size]) -> list[dict[str, torch.Tensor]]:
    """Inputs at every size, each from a seed of its own, at up to 4 of a contract's timesteps, first and last included.

    The samples of a batch stand at different timesteps, so that an export that reads only the first one is found out.
    """
    count = min(TIMESTEPS, len(timesteps))
    picks = [timesteps[place * (len(timesteps) - 1) // max(count - 1, 1)] for place in range(count)]
    made: list[dict[str, torch.Tensor]] = []
    for seed, size in enumerate(sizes):
        levels = [picks[-(seed + place) % len(picks)] for place in range(size.batch)]
        made.append(tensors_of(make(size, levels, seed)))
    return made


@torch.no_grad()
def outputs(denoiser: Denoiser, given: Sequence[Inputs]) -> list[torch.Tensor]:
    """The denoiser's output for every case, on the CPU in fp32."""
    return [denoiser(inputs).float().cpu() for inputs in given]


def compare(reference: Sequence[torch.Tensor], found: Sequence[torch.Tensor], tolerance: float) -> Parity:
    """Largest absolute difference between two lists of outputs; not a number where either holds one.

    Raises:
        PostconditionError: a shape differs.
    """
    differences: list[torch.Tensor] = []
    for place, (wanted, given) in enumerate(zip(reference, found, strict=True)):
        if wanted.shape != given.shape:
            raise PostconditionError(f"case {place}: output {list(given.shape)} given, expected {list(wanted.shape)}")
        differences.append((wanted - given).abs().max())
    return Parity(
        difference=float(torch.stack(differences).max()),
        magnitude=float(torch.stack([wanted.abs().max() for wanted in reference]).max()),
        tolerance=tolerance,
        cases=len(differences),
    )
