"""Memory of Stages II and III at real size, on tensors without storage, against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.passes.dmd import DistributionMatching
from flcompress.passes.stochastic_depth import StochasticDepth
from tests.planning.real_size import RealSize

pytestmark = pytest.mark.e2e


def test_stage_two_takes_what_is_planned(tmp_path: Path) -> None:
    """Of HunyuanVideo at 720p; what masked attention and two kinds of blocks keep."""
    model = RealSize.of("hunyuanvideo", tmp_path, {"num_layers": 1, "num_single_layers": 2})
    counted = model.counted(StochasticDepth)
    assert counted <= model.planned(StochasticDepth) < 1.1 * counted


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "cogvideox-5b"])
def test_stage_three_takes_what_is_planned(name: str, tmp_path: Path) -> None:
    """Two blocks, of which the generator has one; all roles, from their first moments on."""
    model = RealSize.of(name, tmp_path, {"num_layers": 2})
    removed = [model.source.graph.blocks[1].path]
    counted = model.counted(DistributionMatching, removed)
    assert counted <= model.planned(DistributionMatching, removed) < 1.1 * counted
