"""The bound against sums and products in every order, and against an error that is no rounding."""

from __future__ import annotations

import pytest
import torch

from tests.fixtures.rounding import rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [10, 1_000, 10_000])
def test_sums_in_any_order_lie_within_it(size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(8, size, generator=draw).to(dtype)
    scale = values.double().abs().sum(dim=1)
    found = []
    for order in (torch.arange(size), torch.randperm(size, generator=draw), values[0].argsort()):
        total = torch.zeros(8, dtype=dtype)
        for place in order:
            total += values[:, place]
        found.append(total.double())
    worst = max(float(((one - found[0]) / scale).abs().max()) for one in found)
    assert worst < rounding(size, dtype)
    if dtype == torch.float32 and size <= 1_000:  # one addend of all is missing
        missing = found[0] - values[:, 0].double()
        assert float(((missing - found[0]) / scale).abs().max()) > 10 * rounding(size, dtype)


def test_it_grows_with_the_root_of_the_operations() -> None:
    assert rounding(400) == pytest.approx(20 * rounding(1))
    assert rounding(100, torch.float64) < 1e-13
