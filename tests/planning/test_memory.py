from __future__ import annotations

from dataclasses import replace

import pytest

from flcompress.core.settings import EngineName, OffloadName, Precision, Training
from flcompress.core.steps import Cost, Role
from flcompress.passes.prune import Prune
from flcompress.planning.activations import Bytes, SavedActivations
from flcompress.planning.memory import (
    BUCKET,
    PROCESS,
    ParameterShares,
    Placement,
    PlannedMemory,
    plan_memory,
    update_memory,
)


def per_sample(size: float) -> Bytes:
    return Bytes(fixed=0, sample=size)


SAVED = SavedActivations(
    outside=per_sample(100),
    blocks=Bytes(fixed=50, sample=1000),
    block=per_sample(250),
    backward=per_sample(400),
    streams=per_sample(80),
    stream=per_sample(8),
    inference=per_sample(30),
)
GENERATOR = Role("generator", 200, trained=True, averaged=True)
FAKE, REAL = Role("fake", 100, trained=True), Role("real", 50)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
SHARES = ParameterShares(outside=0.1, block=0.1, linear=0.9)


def memory(
    *roles: Role,
    engine: EngineName = "local",
    processes: int = 1,
    gpu: bool = False,
    precision: Precision = "fp32",
    again: bool = False,
    batch: int = 8,
    steps: int = 1,
    micro_batch: int | None = None,
    offload: tuple[OffloadName, ...] = (),
    together: int = 1,
    part: float = 1.0,
    shard_size: int | None = None,
) -> PlannedMemory:
    training = Training(
        engine=engine,
        precision=precision,
        gradient_checkpointing=again,
        micro_batch=micro_batch,
        offload=offload,
        sequence_parallel=together,
        shard_size=shard_size,
    )
    cost = Cost(steps=steps, batch=batch, roles=roles)
    return plan_memory(cost, SAVED, training, SHARES, 200.0, processes=processes, gpu=gpu, part=part)


def test_each_part_of_a_training_pass() -> None:
    """Roles are updated one after the other: gradients and activations of one alone are there at once."""
    found = memory(GENERATOR, FAKE, REAL)
    assert {name: role.lasting for name, role in found.roles.items()} == {
        "generator": 4 * 4 * 200,  # weights, two moments, average
        "fake": 4 * 3 * 100,
        "real": 4 * 50,
    }
    assert found.roles["generator"].gradients == 4 * 200
    assert found.activations == found.update == 8 * 100 + 50 + 8 * 1000 + 8 * (400 - 250)
    assert found.total == PROCESS + 3200 + 1200 + 200 + 10050


def test_what_waits_in_host_memory() -> None:
    """Moments and averages of all roles, the inputs of one role's blocks; a step moves them there and back."""
    critic = replace(FAKE, updates=5)
    plain = memory(GENERATOR, critic, REAL, gpu=True, again=True, batch=8, micro_batch=2)
    moments = memory(GENERATOR, critic, REAL, gpu=True, again=True, batch=8, micro_batch=2, offload=("moments",))
    assert moments.host == 4 * (3 * 200 + 2 * 100)
    assert moments.moved == 2 * 4 * (3 * 200 + 5 * 2 * 100)
    assert plain.total - moments.total == moments.host  # here activations are the peak of an update
    assert {name: role.lasting for name, role in moments.roles.items()} == {
        "generator": 4 * 200, "fake": 4 * 100, "real": 4 * 50
    }  # fmt: skip
    both = memory(GENERATOR, critic, REAL, gpu=True, again=True, batch=8, micro_batch=2, offload=("moments", "inputs"))
    assert both.host == moments.host + 2 * 80
    assert both.moved == moments.moved + 2 * 8 * 80 * (1 + 5 * 0.5)  # every micro batch, and half the blocks
    assert moments.total - both.total == 2 * 80
    # A step has the moments of a block at once, at most; on a CPU it is all the same memory.
    small = memory(GENERATOR, gpu=True, batch=0, offload=("moments",))
    assert small.update == 4 * 200 + 0.1 * 2 * 4 * 200
    assert memory(GENERATOR, offload=("moments",)) == memory(GENERATOR)


def test_weights_that_some_of_the_processes_split() -> None:
    """Models are those of as many processes as a copy is split over, activations those of all."""
    every, some = (memory(GENERATOR, REAL, engine="fsdp2", processes=8, shard_size=size) for size in (None, 2))
    two = memory(GENERATOR, REAL, engine="fsdp2", processes=2)
    assert some.roles == two.roles != every.roles
    assert some.activations == every.activations != two.activations


def test_features_of_a_frozen_model_are_beside_the_activations() -> None:
    """What every one of its blocks returned, for the samples that are in memory at once."""
    cost = Cost(steps=1, batch=8, roles=(GENERATOR, REAL))
    training = Training(micro_batch=2)
    plain, beside = (
        plan_memory(replace(cost, keeps_features=keeps), SAVED, training, SHARES, 200.0, processes=1, gpu=True)
        for keeps in (False, True)
    )
    assert beside.update == plain.update + 2 * 80
    assert beside.host == 0.0


def test_gradients_take_most_where_activations_are_few() -> None:
    """AdamW steps one tensor at a time."""
    assert memory(GENERATOR, batch=0).update == 4 * 200
    assert memory(GENERATOR, batch=0, engine="ddp", processes=4).update == 50  # in the buckets, which stay


def test_the_backward_of_the_first_block_is_next_to_nearly_all_gradients() -> None:
    """Checkpointed blocks are recomputed there too, one after the other."""
    large = Role("generator", 4000, trained=True)
    cost, training = Cost(steps=1, batch=8, roles=(large,)), Training(gradient_checkpointing=True)
    found = plan_memory(cost, SAVED, training, SHARES, 4000.0, processes=1, gpu=True)
    assert found.activations == 8 * (100 + 80 + 400)
    assert found.update == 4 * 4000 + 8 * 400


def test_a_frozen_forward_may_take_more_than_a_backward() -> None:
    """It runs while what the trained one saved is there."""
    saved = replace(SAVED, inference=per_sample(700))
    found = plan_memory(
        Cost(steps=1, batch=8, roles=(GENERATOR, REAL)), saved, Training(), SHARES, 200.0, processes=1, gpu=True
    )
    assert found.activations == 8 * (100 + 1000 + 700) + 50


def test_one_moment_takes_half_of_two() -> None:
    one = Role("generator", 200, trained=True, moments=1)
    assert memory(one).roles["generator"].moments == 4 * 200
    assert memory(one, engine="zero2", processes=4).roles["generator"].moments == 4 * 200 / 4
    step = [update_memory(200, moments, 0.0, Placement("zero2", 4, gpu=False)).step for moments in (1, 2)]
    assert step == [2 * 4 * 200 / 4, 4 * 4 * 200 / 4]  # stepped in slices, or with denominators


def test_half_precision_and_checkpointing_save_what_they_can() -> None:
    found = memory(GENERATOR, REAL, precision="bf16", again=True)
    assert found.roles["generator"].weights == 4 * 200
    assert found.roles["real"].weights == 2 * 50
    assert found.activations == 8 * (100 + 80 + 400)


def test_processes_that_compute_a_clip_together_share_its_activations() -> None:
    """Two groups of four, each with half of the batch; what their attention exchanges is added."""
    whole = memory(GENERATOR, engine="fsdp2", processes=8, batch=2 * 8)
    split = memory(GENERATOR, engine="fsdp2", processes=8, batch=4, together=4, part=0.3)
    assert split.roles == whole.roles
    assert whole.activations == 2 * (100 + 1000 + 150) + 50
    assert split.activations == pytest.approx(2 * 0.3 * (100 + 1000 + 150 + 6 * 8) + 50)
    score = memory(REAL, processes=8, batch=1, steps=0, together=4, part=0.3)
    assert score.update == 30  # a pass that does not train has whole clips


def test_without_a_backward_what_is_alive_counts() -> None:
    found = memory(REAL, precision="bf16", steps=0)
    assert (found.roles["real"].weights, found.update) == (4 * 50, 8 * 30)


def test_a_pass_without_a_model_in_memory_takes_none() -> None:
    """Pruning: weights are copied on disk, and what it tries is a small model on the CPU."""
    assert memory(gpu=True, steps=0).total == 0
    assert Prune(remove=0.3).cost(1e9, 30, 1e9) == Cost()


def test_a_shallow_role_keeps_fewer_activations() -> None:
    """Half as deep; a LoRA runs as deep as its base, however small it is."""
    assert memory(FAKE).activations == 8 * 100 + (50 + 8 * 1000) / 2 + 8 * 150
    lora = Role("LoRA", 2, trained=True, runs=100)
    assert memory(lora).activations == memory(FAKE).activations
    assert memory(lora, REAL).roles["LoRA"].moments == 2 * 4 * 2


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "moments", "average", "kept"),
    [
        ("ddp", 800, 0, 1600, 800, 800),  # kept: its buckets, where gradients lie
        ("zero1", 800, 800, 400, 800, 200),  # kept: the fp32 part
        ("zero2", 800, 200, 400, 800, 200),
        ("zero3", 200, 200, 400, 200, 200 + 800 + 800),  # kept: gradients, bucket, gathered weights
        ("fsdp2", 200, 200, 400, 200, 0),
    ],
)
def test_what_a_process_of_four_holds(
    engine: EngineName, weights: float, gradients: float, moments: float, average: float, kept: float
) -> None:
    role = memory(GENERATOR, engine=engine, processes=4).roles["generator"]
    found = (role.weights, role.gradients, role.moments, role.average, role.engine)
    assert found == (weights, gradients, moments, average, kept)


def test_fsdp2_gathers_weights_of_linear_layers_in_half_precision() -> None:
    """Nine tenths of them here; the gradients of a gathered block, and the copy that is sent, are whole."""
    gathered = 4 * 200 * (0.1 + 2 * 0.1)
    exact, rounded = (update_memory(200, 2, gathered, Placement("fsdp2", 4, gpu=True), rounded=x) for x in (1.0, 0.55))
    assert (exact.forward, exact.backward) == (gathered, 200 + 3 * gathered)
    assert rounded.forward == 0.55 * gathered
    assert rounded.backward == pytest.approx(200 + 2.55 * gathered)
    whole, half = (memory(GENERATOR, engine="fsdp2", processes=4, precision=name, batch=8) for name in PRECISIONS)
    assert whole.update - half.update == pytest.approx(0.45 * gathered)


@pytest.mark.parametrize(("engine", "weights"), [("ddp", 200), ("zero2", 200), ("zero3", 50), ("fsdp2", 50)])
def test_frozen_weights_are_split_where_all_are(engine: EngineName, weights: float) -> None:
    assert memory(GENERATOR, REAL, engine=engine, processes=4).roles["real"].weights == weights


def test_activations_are_those_of_a_process_own_samples() -> None:
    assert memory(GENERATOR, engine="ddp", processes=4).activations == 2 * (100 + 1000 + 150) + 50


def test_a_gpu_reserves_deepspeeds_bucket_whole_and_has_no_interpreter() -> None:
    found = memory(GENERATOR, engine="zero2", processes=4, gpu=True)
    assert found.process == 0
    assert found.update > 4 * BUCKET


@pytest.mark.parametrize(
    ("engine", "processes", "waiting"),
    [
        ("local", 1, 4 * 200),
        ("ddp", 4, 4 * 200),
        ("zero1", 4, 4 * 200),
        ("zero2", 4, 200),
        ("zero3", 4, 0),  # its gradients' place is there all the time
        ("fsdp2", 4, 200),
    ],
)
def test_gradients_of_earlier_micro_batches_are_beside_the_activations(
    engine: EngineName, processes: int, waiting: float
) -> None:
    batch = 8 * processes
    one, whole = (memory(GENERATOR, engine=engine, processes=processes, batch=n * processes) for n in (2, 8))
    parts = memory(GENERATOR, engine=engine, processes=processes, batch=batch, micro_batch=2)
    assert parts.activations == one.activations < whole.activations
    assert parts.update == one.update + waiting
    assert parts.roles == whole.roles


def test_a_micro_batch_as_large_as_the_share_changes_nothing() -> None:
    assert memory(GENERATOR, engine="ddp", processes=4, micro_batch=2) == memory(GENERATOR, engine="ddp", processes=4)
    assert memory(REAL, steps=0, micro_batch=1) == memory(REAL, steps=0)  # what does not train has none
