"""AdamW without a first moment against torch's, and what each keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.training.engines import Hyper
from flcompress.training.engines import optimiser as module
from flcompress.training.engines.optimiser import MomentumFreeAdamW, optimiser


def weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).requires_grad_(True) for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.1]),
    beta2=st.sampled_from([0.9, 0.999]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    at_once=st.sampled_from([1, 4, 1 << 24]),
)
def test_steps_are_those_of_adamw_without_momentum(
    shapes: list[tuple[int, ...]], decay: float, beta2: float, scale: float, at_once: int
) -> None:
    ours, stock = weights(*shapes), weights(*shapes)
    hyper = Hyper(learning_rate=1e-2, betas=(0.0, beta2), weight_decay=decay)
    mine = optimiser(ours, hyper)
    theirs = torch.optim.AdamW(stock, lr=1e-2, betas=(0.0, beta2), weight_decay=decay)
    draw = torch.Generator().manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE", at_once)
        for _ in range(4):
            for one, other in zip(ours, stock, strict=True):
                one.grad = scale * torch.randn(one.shape, generator=draw)
                other.grad = one.grad.clone()
            mine.step()
            theirs.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, stock, strict=True))


def test_one_moment_is_kept_and_a_parameter_without_gradient_is_left_alone() -> None:
    moved, left = weights((3, 2), (4,))
    before = left.detach().clone()
    mine = MomentumFreeAdamW([moved, left], lr=1e-2, beta2=0.999, weight_decay=0.1)
    moved.grad = torch.ones(3, 2)
    mine.step()
    assert sorted(mine.state[moved]) == ["exp_avg_sq", "step"]
    assert left not in mine.state
    assert torch.equal(left, before)


def test_momentum_is_torchs_own() -> None:
    made = optimiser(weights((2,)), Hyper(learning_rate=1e-3))
    assert type(made) is torch.optim.AdamW
