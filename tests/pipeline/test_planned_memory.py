from __future__ import annotations

from flcompress.pipeline.passes import Cost
from flcompress.pipeline.planned_memory import PROCESS, planned_memory


def test_each_part_of_a_training_pass() -> None:
    memory = planned_memory(Cost(batch=8, trained=200, averaged=100, frozen=50), kept=1000, blocks=4)
    assert memory.weights == 4 * 250
    assert memory.gradients == 4 * 200
    assert memory.moments == 2 * 4 * 200
    assert memory.average == 4 * 100
    assert memory.activations == 8 * 1000
    assert memory.total == PROCESS + 1000 + 800 + 1600 + 400 + 8000


def test_without_a_backward_one_block_is_alive_at_a_time() -> None:
    memory = planned_memory(Cost(batch=8, frozen=50), kept=1000, blocks=4)
    assert (memory.gradients, memory.moments, memory.average, memory.activations) == (0, 0, 0, 2000)
