"""What waits in host memory changes no bit of a training, and is where it is said to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from flcompress.core.settings import Training
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.training.checkpoint import Checkpoints
from flcompress.training.engines import Hyper, offload
from flcompress.training.engines.replicated import Local
from flcompress.training.role import TrainedRole
from tests.fixtures.gaussian import work_in
from tests.fixtures.tiny import tiny_pipeline

BETAS = [(0.9, 0.999), (0.0, 0.999)]


def role(folder: Path, betas: tuple[float, float], *, moments: bool) -> TrainedRole:
    torch.manual_seed(0)
    work = replace(work_in(folder), offload=("moments",) if moments else ())
    hyper = Hyper(learning_rate=0.1, betas=betas, weight_decay=0.1)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))
    return TrainedRole(Local(work), "model", model, batch=4, hyper=hyper, ema_decay=0.9)


def train(trained: TrainedRole, first: int, last: int) -> None:
    for step in range(first, last):
        trained.update(Draws("offload", step, batch=4), lambda draws: trained.module(draws.normal(3)).square().mean())


def held(trained: TrainedRole) -> dict[str, list[float]]:
    return {name: part.tensor.tolist() for name, part in trained.parts().items()}


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_moments_and_averages_are_the_same_bits(tmp_path: Path, betas: tuple[float, float]) -> None:
    plain, away = role(tmp_path, betas, moments=False), role(tmp_path, betas, moments=True)
    train(plain, 0, 3)
    train(away, 0, 3)
    assert held(away) == held(plain)
    assert len(held(away)) == 4 * (len([beta for beta in betas if beta]) + 3) + 1
    assert away.averaged_state()["0.weight"].tolist() == plain.averaged_state()["0.weight"].tolist()
    assert held(away) == held(plain)  # an evaluation's swap with the average took nothing with it


@pytest.mark.parametrize("betas", BETAS, ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["to the host", "from the host"])
def test_a_training_resumes_with_or_without(tmp_path: Path, betas: tuple[float, float], first: bool) -> None:
    whole, begun = role(tmp_path, betas, moments=False), role(tmp_path, betas, moments=first)
    train(whole, 0, 4)
    train(begun, 0, 2)
    store = Checkpoints(tmp_path, World(), "local", print)
    store.save(2, begun.parts())
    resumed = role(tmp_path, betas, moments=not first)
    _, stored = store.load()
    assert stored is not None
    resumed.restore(stored)
    assert held(resumed) == held(begun)
    train(resumed, 2, 4)
    assert held(resumed) == held(whole)


def test_inputs_of_blocks_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor of each block waits: its stream of tokens, and nothing that the blocks share."""
    folder = tiny_pipeline(tmp_path / "model") / "transformer"
    moved: list[tuple[int, ...]] = []

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tuple(tensor.shape))
        return torch.empty_like(tensor).copy_(tensor)

    monkeypatch.setattr(offload, "to_host", counted)
    gradients = []
    for names in ((), ("inputs",)):
        model = load_transformer(folder).requires_grad_(True)
        work = replace(work_in(tmp_path), gradient_checkpointing=True, offload=names)
        Local(work).checkpoint_blocks(model)
        torch.manual_seed(0)
        for _ in range(2):  # a second micro batch adds to the first's gradients
            inputs = example_inputs(model, batch=2, latent_shape=(3, 8, 8), tokens=4)
            model(**inputs, return_dict=False)[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        if not names:
            assert moved == []
    assert moved == 2 * [(2, 48, 32)] * len(model.blocks)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"offload: \[moments\] given with engine: zero2, expected local, ddp or"):
        Training(engine="zero2", offload=("moments",))
    with pytest.raises(ValidationError, match=r"offload: inputs given without gradient_checkpointing, which is what"):
        Training(offload=("inputs",))
    assert Training(offload=("moments",)).decisive == Training().decisive
