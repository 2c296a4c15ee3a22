from __future__ import annotations

from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.pipeline.passes import Cost
from flcompress.pipeline.planned_memory import PROCESS, kept_for_backward, planned_memory


def test_what_a_backward_needs_is_counted_as_a_real_one_keeps_it(model: Path) -> None:
    transformer = load_transformer(model / "transformer").requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in transformer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        transformer(**example_inputs(transformer, latent_shape=(2, 4, 4), tokens=16))
    real = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    assert real > 0
    assert kept_for_backward(model / "transformer", 16, (2, 4, 4)) == real


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
