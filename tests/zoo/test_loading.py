"""Every transformer class: made without memory and filled from its files, it is what stock diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flcompress.models.loading import empty_transformer, load_transformer
from tests.zoo import ZOO
from tests.zoo.check import randomised

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]  # stock models warn of much that is not ours]


def held(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model: weights, buffers that are saved and that are not, and plain attributes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                tensors |= {f"{path}.{name}[{index}]": leaf for index, leaf in enumerate(leaves)}
    return tensors


def filled(folder: Path, dtype: torch.dtype | None) -> Any:
    model, stored = empty_transformer(folder, "cpu", dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for name, tensor in model.state_dict().items():
        stored[name].fill(tensor)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_it_is_what_stock_loading_gives(name: str, tmp_path: Path) -> None:
    randomised(ZOO[name]).save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        stock, ours = load_transformer(tmp_path, "cpu", dtype), filled(tmp_path, dtype)
        expected, actual = held(stock), held(ours)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
            assert torch.equal(actual[key], value), key
            assert actual[key].requires_grad == value.requires_grad, key
        assert not ours.training
