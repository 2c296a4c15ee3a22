"""Bytes that a process sends, in closed form. In real steps they are counted in tests/training/engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from flcompress.core.program import Fact
from flcompress.core.settings import EngineName, Precision, Training
from flcompress.core.steps import Cost, Pass, Role
from flcompress.driver.start import trace_folder
from flcompress.models.loading import meta_transformer
from flcompress.passes.consistency import Consistency
from flcompress.passes.dmd import DistributionMatching
from flcompress.passes.feature_distill import FeatureDistill
from flcompress.passes.pretrain import Pretrain
from flcompress.passes.stochastic_depth import StochasticDepth
from flcompress.planning.exchanges import (
    Group,
    PlannedExchanges,
    Sent,
    Shapes,
    SplitClip,
    TransformerShapes,
    backwards_of,
    plan_exchanges,
)

INSIDE, OUTSIDE = 1606, 40
PARAMETERS = INSIDE + OUTSIDE
SHAPES = TransformerShapes(
    inside=Shapes(linear={16: 1600}, others={1: 6}),  # a modulation table, which four processes send four times
    outside=Shapes(linear={4: 40}),
)
PADDED = 1600 + 4 * 6
MODEL = Role("model", PARAMETERS, trained=True)
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
TARGETS: tuple[Literal["frozen", "ema", "self"], ...] = ("frozen", "ema", "self")
CLIP = SplitClip(tokens=64, text=8, heads=4, width=10, blocks=3, joined=True)


def exchanges(
    *roles: Role,
    engine: EngineName,
    processes: int = 4,
    batch: int = 4,
    precision: Precision = "fp32",
    micro_batch: int | None = None,
    again: bool = False,
    together: int = 1,
    shard_size: int | None = None,
    compiled: bool = False,
) -> PlannedExchanges:
    training = Training(
        engine=engine,
        precision=precision,
        gradient_checkpointing=again,
        micro_batch=micro_batch,
        sequence_parallel=together,
        shard_size=shard_size,
        compile=compiled,
    )
    cost = Cost(steps=1, batch=batch, roles=roles)
    return plan_exchanges(cost, training, SHAPES, CLIP, processes=processes, precision=precision)


def test_rings_and_all_to_alls() -> None:
    machine, two, four = (Group.neighbours(size) for size in (8, 16, 32))
    assert machine.gather(80) == Sent(70, 0)
    assert two.gather(128) == Sent(105, 15)  # fifteen parts of eight, by a ring in which one neighbour of eight is far
    assert four.reduce(256) == Sent(2 * 217, 2 * 31)
    assert machine.transpose(80) == Sent(70, 0)
    assert two.transpose(160) == Sent(70, 80)
    assert Group.copies(32, 8) == Group(4, 1)
    assert Group.copies(32, 8).reduce(16) == Sent(0, 24)
    assert Group.copies(8, 2) == Group(4, 4)
    assert Group.copies(8, 8).reduce(16) == Sent()


@pytest.mark.parametrize(
    ("engine", "hidden", "waiting"),
    [
        ("local", 0, 0),
        ("ddp", 2 * 4 * PARAMETERS, 0),
        ("zero1", 0, (2 + 1) * 4 * PARAMETERS),
        ("zero2", 0, (2 * 2 + 1) * 4 * PARAMETERS),
        ("zero3", 2 * (2 + 1) * 4 * PARAMETERS, 0),
        ("fsdp2", 2 * 4 * ((2 + 1) * PADDED + (1 + 1) * OUTSIDE), 0),
    ],
)
def test_a_step_of_two_micro_batches_on_four_processes(engine: EngineName, hidden: float, waiting: float) -> None:
    """Three quarters of what is gathered or scattered is sent, and twice that of what is reduced everywhere."""
    sent = exchanges(MODEL, engine=engine, processes=1 if engine == "local" else 4, batch=8, micro_batch=1)
    assert sent == PlannedExchanges(hidden=Sent(0.75 * hidden), waiting=Sent(0.75 * waiting))
    assert exchanges(MODEL, engine=engine, processes=1) == PlannedExchanges()


@pytest.mark.parametrize(("engine", "width"), [("fsdp2", 2), ("zero3", 2), ("ddp", 0), ("zero1", 0), ("zero2", 0)])
def test_a_frozen_model_is_gathered_for_every_forward(engine: EngineName, width: int) -> None:
    """In its own precision; what is outside of its blocks stays gathered under fsdp2."""
    frozen = exchanges(Role("real", PARAMETERS, forwards=2.5), engine=engine, precision="bf16")
    numbers = PADDED if engine == "fsdp2" else PARAMETERS
    assert frozen == PlannedExchanges(hidden=Sent(0.75 * width * 2.5 * numbers))
    twice = exchanges(Role("real", PARAMETERS, forwards=2.5, backwards=1.0), engine="fsdp2", precision="bf16")
    assert twice.hidden.within == 0.75 * 2 * (4.5 * PADDED + OUTSIDE)


def test_fsdp2_gathers_weights_of_linear_layers_in_half_precision() -> None:
    exact, rounded = (exchanges(MODEL, engine="fsdp2", precision=name).hidden.within for name in PRECISIONS)
    assert exact - rounded == 0.75 * 2 * (2 * 1600 + OUTSIDE)
    assert exchanges(MODEL, engine="fsdp2", precision="bf16", compiled=True).hidden.within == exact


def test_skipped_blocks_and_several_updates() -> None:
    """fsdp2 and ZeRO exchange what ran; ddp's buckets are whole, and ZeRO-3 computes skipped blocks."""
    role = replace(MODEL, updates=2, backwards=1.5, forwards=1.0)
    sent = exchanges(role, engine="fsdp2").hidden.within
    assert sent == 0.75 * 4 * (PADDED * (1.0 + 3 * 1.5) + OUTSIDE * 2 * 2)
    assert exchanges(role, engine="ddp").hidden.within == 2 * 2 * 0.75 * 4 * PARAMETERS
    waiting = exchanges(role, engine="zero2").waiting.within
    assert waiting == pytest.approx(0.75 * 4 * (2 * (1.5 * INSIDE + 2 * OUTSIDE) + 2 * PARAMETERS))
    assert exchanges(role, engine="zero3").hidden.within == 0.75 * 4 * PARAMETERS * (1 + 2 * 2 + 2)


def test_a_lora_is_one_piece_and_its_forwards_are_its_bases() -> None:
    lora = exchanges(Role("LoRA", 100, trained=True, updates=2, blockless=True), engine="fsdp2", together=2)
    assert lora == PlannedExchanges(hidden=Sent(0.75 * 4 * 100 * (2 + 2)))


def test_copies_in_each_machine_exchange_parts_of_gradients_once_an_update() -> None:
    """Sixteen processes: weights go within machines, an eighth of the gradients from one to the other."""
    every = exchanges(MODEL, engine="fsdp2", processes=16, batch=32, micro_batch=1).hidden
    some = exchanges(MODEL, engine="fsdp2", processes=16, batch=32, micro_batch=1, shard_size=8).hidden
    eight = 1600 + 8 * 6
    assert some.within == 7 / 8 * 2 * 4 * (3 * eight + 2 * 8 * 10)
    assert some.between == 2 * (1 / 2) * 4 * (eight + 80) / 8
    assert every.between == pytest.approx(every.within / 7)
    assert every.between > 4 * some.between


def test_processes_that_compute_a_clip_together_exchange_tokens_for_heads() -> None:
    """q, k, v and the output of 16 tokens, the output of the text from all heads; forward, backward and recomputed."""
    numbers = 3 * 10 * (4 * 64 / 4 + 8)
    assert CLIP.exchanged(4) == numbers
    sent = [exchanges(MODEL, engine="ddp", batch=2, together=4, again=again).waiting for again in (False, True)]
    assert sent == [Sent(0.75 * 4 * 2 * runs * numbers) for runs in (2, 3)]
    frozen = exchanges(Role("real", PARAMETERS, forwards=2.0), engine="ddp", batch=2, together=4, precision="bf16")
    assert frozen == PlannedExchanges(waiting=Sent(0.75 * 2 * 2 * 2 * numbers))
    assert replace(CLIP, joined=False).exchanged(4) == 3 * 10 * 64


@pytest.mark.parametrize(
    "step",
    [
        Pretrain(steps=1),
        *(StochasticDepth(steps=1, remove=0.3, target=target) for target in TARGETS),
        Consistency(student_steps=4, steps=1),
        FeatureDistill(steps=1),
        DistributionMatching(steps=1),
        DistributionMatching(steps=1, intra_cfg=(0.2, 0.3), gan_weight=0.1),
        DistributionMatching(steps=1, inter_cfg=(1.0, 1.0), gan_weight=0.1, gan_r1=0.0, critic_updates=2),
        DistributionMatching(steps=1, fake_score="lora", real_lean=0.2, gan_weight=0.1),
        DistributionMatching(steps=1, fake_score="lora", generator="lora"),
        DistributionMatching(steps=1, fake_score="lora", generator="lora", real_score="elastic"),
    ],
    ids=lambda step: step.name,
)
def test_the_forwards_of_a_pass_are_those_of_its_roles(step: Pass) -> None:
    """A backward is as much work as two forwards, without gradients of weights as one. A LoRA's are its base's."""
    parameters = 700.0 if Fact.PRUNED in step.needs or Fact.FEW_STEP in step.gives else 1000.0
    cost = step.cost(parameters, 7, 1000.0)
    roles = [(role.parameters / 1000.0, role) for role in cost.roles if not role.blockless]
    work = sum(share * (role.forwards + (3 if role.trained else 2) * backwards_of(role)) for share, role in roles)
    batches = cost.steps * cost.batch
    assert work == pytest.approx(cost.forwards / batches)
    assert sum(share * backwards_of(role) for share, role in roles) == pytest.approx(cost.recomputed / batches)


def test_shapes_of_a_transformer(model: Path) -> None:
    transformer = model / "transformer"
    graph, network = trace_folder(transformer, 16), meta_transformer(transformer)
    shapes = TransformerShapes.of(network, graph)
    assert shapes.inside.numbers == sum(block.parameters for block in graph.blocks)
    assert shapes.inside.numbers + shapes.outside.numbers == graph.parameters
    tables = {name: value for name, value in network.named_parameters() if len(value) == 1}
    assert {name.rpartition(".")[2] for name in tables} == {"scale_shift_table"}
    padding = sum(value.numel() for value in tables.values())
    whole = [shapes.inside.split(parts, 4, 4) + shapes.outside.split(parts, 4, 4) for parts in (1, 2)]
    assert whole == [4 * graph.parameters, 4 * (graph.parameters + padding)]
    assert 0.9 < shapes.linear < 1.0
    assert shapes.depth(Role("model", graph.parameters)) == 1.0
