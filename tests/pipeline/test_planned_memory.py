from __future__ import annotations

from flcompress.pipeline.passes import Cost, Role
from flcompress.pipeline.planned_memory import PROCESS, Kept, planned_memory
from flcompress.pipeline.recipe import Training

KEPT = Kept(whole=1000, block=250, checkpointed=330)
ROLES = (Role("generator", 200, trained=True, averaged=True), Role("fake", 100, trained=True), Role("real", 50))


def test_each_part_of_a_training_pass() -> None:
    memory = planned_memory(Cost(steps=1, batch=8, roles=ROLES), KEPT, Training())
    assert memory.roles == {"generator": 4 * 5 * 200, "fake": 4 * 4 * 100, "real": 4 * 50}
    assert memory.activations == 8 * 1000
    assert memory.total == PROCESS + 4000 + 1600 + 200 + 8000
    assert next(iter(memory.parts())) == "process"


def test_half_precision_and_checkpointing_save_what_they_can() -> None:
    training = Training(precision="bf16", gradient_checkpointing=True)
    memory = planned_memory(Cost(steps=1, batch=8, roles=ROLES), KEPT, training)
    assert memory.roles == {"generator": 4 * 5 * 200, "fake": 4 * 4 * 100, "real": 2 * 50}
    assert memory.activations == 8 * 330


def test_without_a_backward_one_block_is_alive_at_a_time() -> None:
    memory = planned_memory(Cost(batch=8, roles=(Role("transformer", 50),)), KEPT, Training(precision="bf16"))
    assert (memory.roles, memory.activations) == ({"transformer": 200}, 2000)
