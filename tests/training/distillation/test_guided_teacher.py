"""The guided teacher: its pruned self, whichever blocks the prune set holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flcompress.core.steps import PassContext
from flcompress.draws import Draws
from flcompress.models.inputs import example_inputs
from flcompress.models.network import as_network
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from flcompress.training.distillation.guided_teacher import GuidedTeacher
from flcompress.training.distillation.settings import NO_INTER
from flcompress.training.engines import engine_of
from tests.tracing import models


@pytest.mark.parametrize(("case", "streams"), [(models.wan, 1), (models.cogvideox, 2)])
@pytest.mark.parametrize("places", [(0,), (0, 2), (1, 2)])
def test_its_pruned_self_may_lack_the_first_block(
    case: Callable[[], models.Case], streams: int, places: tuple[int, ...], tmp_path: Path
) -> None:
    model, _ = case()
    inputs = example_inputs(model)
    graph = trace(model, inputs)
    assert len(graph.blocks[0].streams) == streams
    gone = [graph.blocks[place].path for place in places if place < len(graph.blocks)]
    work = PassContext(
        directory=tmp_path, seed=0, data=lambda program: pytest.fail("no data"), progress=lambda *told: None
    )
    x, timestep = torch.randn(1, 4, 2, 8, 8), torch.tensor([300.0])
    given = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    network = as_network(model)
    with torch.no_grad():
        full = network(x, timestep, given)
        with skip(model, gone, graph=graph):
            pruned = network(x, timestep, given)
    assert not torch.equal(full, pruned)
    teacher = GuidedTeacher(
        engine_of(work), model, network, graph, gone, inter_cfg=NO_INTER, intra_cfg=(0.5, 0.5), negative={}
    )
    guided = teacher(x, timestep, given, teacher.draw(Draws(0, "test", batch=1)))
    torch.testing.assert_close(guided, full + 0.5 * (full - pruned), rtol=0.0, atol=1e-5)
