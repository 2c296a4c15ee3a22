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
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if not name.startswith("_"):
                leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
                found |= {f"{path}.{name}[{place}]": leaf for place, leaf in enumerate(leaves)}
    return found


def filled(folder: Path, dtype: torch.dtype | None) -> Any:
    model, stored = empty_transformer(folder, "cpu", dtype)
    assert all(parameter.is_meta for parameter in model.parameters())
    model._apply(lambda one: torch.empty_like(one, device="cpu") if one.is_meta else one)
    for name, tensor in model.state_dict().items():
        stored[name].fill(tensor)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_it_is_what_stock_loading_gives(name: str, tmp_path: Path) -> None:
    randomised(ZOO[name]).save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        stock, ours = load_transformer(tmp_path, "cpu", dtype), filled(tmp_path, dtype)
        expected, found = held(stock), held(ours)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
            assert torch.equal(found[key], value), key
            assert found[key].requires_grad == value.requires_grad, key
        assert not ours.training
