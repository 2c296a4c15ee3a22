"""Every family's network on a GPU against the CPU, and back ends against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flcompress.models.families import family_of
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from tests.families.pipelines import EXPORTED, save
from tests.fixtures.rounding import relative, rounding

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def prediction(folder: Path, device: str, dtype: torch.dtype | None, kernel: str | None = None) -> torch.Tensor:
    model = load_transformer(folder / "transformer", device, dtype)
    if kernel is not None:
        model.set_attention_backend(kernel)
    family, draw = family_of(type(model).__name__), torch.Generator().manual_seed(0)
    shape = family.fixed_latents(model.config) or ((1 if EXPORTED[folder.name].size[0] == 1 else 2), 4, 4)
    conditioning = family.example_conditioning(model.config, 2, shape, 16, draw)
    x = torch.randn(2, family.channels(model.config), *shape, generator=draw)
    given = {name: tensor.to(device) for name, tensor in conditioning.items()}
    with torch.no_grad():
        predicted = as_network(model)(x.to(device), torch.tensor([300.0, 700.0], device=device), given)
    return predicted.float().cpu()


@pytest.mark.parametrize("name", EXPORTED)
def test_predictions_are_those_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = save(name, tmp_path / name)
    exact = prediction(folder, "cpu", None)
    assert relative(prediction(folder, "cuda", None), exact) < rounding(10_000)
    assert relative(prediction(folder, "cuda", torch.bfloat16), exact) < 0.05
