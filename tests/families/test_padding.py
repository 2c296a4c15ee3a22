"""What a dataset leaves out of prompts: embeddings behind the last token that the mask shows, which no result sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flcompress.data.compact import without_padding
from flcompress.models.families import family_of
from flcompress.models.families.registry import known_families
from flcompress.models.families.shared import MASKED
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network

pytestmark = pytest.mark.e2e

EMBEDS, MASK = MASKED
MASKED_PIPELINES = ("hunyuan-video", "hunyuan-video-i2v-concat", "hunyuan-video-i2v-replace", "ltx", "mochi")


def test_every_family_that_says_so_is_below() -> None:
    assert [family.name for family in known_families() if family.ignores_padding] == ["HunyuanVideo", "LTX", "Mochi"]


@pytest.mark.parametrize("name", MASKED_PIPELINES)
def test_no_prediction_sees_the_padding(pipeline_folder: Callable[[str], Path], name: str) -> None:
    """To the last bit, with a mask that has a hole, as pictures leave in HunyuanVideo's; what it shows does matter."""
    model = load_transformer(pipeline_folder(name) / "transformer")
    network, family, draw = as_network(model), family_of(type(model).__name__), torch.Generator().manual_seed(0)
    shape = family.fixed_latents(model.config) or (2, 4, 4)
    given = family.example_conditioning(model.config, 2, shape, 16, draw)
    given[MASK][:, 3], given[MASK][1, -6:] = 0.0, 0.0
    x = torch.randn(2, family.channels(model.config), *shape, generator=draw)

    def predicted(conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return network(x, torch.tensor([300.0, 700.0]), conditioning)

    stored = without_padding(family, given)
    assert not stored[EMBEDS][1, -6:].any()
    assert stored[EMBEDS][:, :4].all()
    assert torch.equal(predicted(stored), predicted(given))
    stored[EMBEDS][:, 2] = 0.0
    assert not torch.equal(predicted(stored), predicted(given))
