"""LoRAs on a shared transformer of every family: each reaches its layers, and merges into the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.tracing.skip import graph_of
from flcompress.training.shared_base import LoRA, SharedBase, merge
from tests.families.pipelines import TINY

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", TINY)
def test_every_half_of_a_lora_is_trained_and_merged(pipeline_folder: Callable[[str], Path], name: str) -> None:
    model = load_transformer(pipeline_folder(name) / "transformer")
    paths = [block.path for block in graph_of(model).blocks]
    lora = LoRA(SharedBase(model, paths), paths, 2, seed=0)
    draw = torch.Generator().manual_seed(0)
    for value in lora.lora_B.values():
        value.data.normal_(std=0.01, generator=draw)
    for value in lora.own.values():
        value.data.add_(0.01 * torch.randn(value.shape, generator=draw))
    given = example_inputs(model, batch=2)
    output = lora(**given, return_dict=False)[0]
    output.float().square().mean().backward()
    gradients = {one: value.grad for one, value in lora.named_parameters()}
    reached = {one for one, gradient in gradients.items() if gradient is not None and gradient.any()}
    # What does not reach the output, such as the text's last feed-forward in some, has no gradient in the model either.
    whole = load_transformer(pipeline_folder(name) / "transformer").requires_grad_(True)
    whole(**given, return_dict=False)[0].float().square().mean().backward()
    linears = [one for path in paths for one, found in whole.get_submodule(path).named_modules(prefix=path)
               if isinstance(found, nn.Linear)]  # fmt: skip
    used = {one for one, value in whole.named_parameters() if value.grad is not None and value.grad.any()}
    adapted = {f"{one}.weight" for one in linears} & used
    assert adapted
    assert used > adapted
    assert reached == {
        *(f"{half}.{_key(one.removesuffix('.weight'))}" for one in adapted for half in ("lora_A", "lora_B")),
        *(f"own.{_key(one)}" for one in used - adapted),
    }
    merged = merge(model.state_dict(), lora.state_dict(), {path: path for path in paths})
    with torch.no_grad():
        before = model(**given, return_dict=False)[0]
        model.load_state_dict(merged)
        after = model(**given, return_dict=False)[0]
    assert float((after - before).abs().max()) > 1e-4
    torch.testing.assert_close(after, output.detach(), rtol=1e-4, atol=1e-5)


def _key(path: str) -> str:
    return path.replace(".", "/")
