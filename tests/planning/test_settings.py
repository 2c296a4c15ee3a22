"""What fits, what is advised, and wrong requests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flcompress.errors import RequestError
from flcompress.frontend.loading import load_recipe
from flcompress.planning import plan as planning
from flcompress.planning.activations import Bytes, SavedActivations
from flcompress.planning.machines import RESERVE, Machine, gpu_here, gpu_machine
from flcompress.planning.plan import Plan, make_plan
from flcompress.planning.text import plan_text
from tests.fixtures.recipes import WriteRecipe

GPU = Machine(name="toy", count=2, memory=80e9, half=2e12, single=1e12, gpu=True)
PASSES = "passes: [score, {cut: {keep: 0.7}}]\n"


def plan(write: WriteRecipe, machine: Machine = GPU, training: str = "{}") -> Plan:
    return make_plan(load_recipe(write(f"training: {training}\n{PASSES}")), machine=machine)


def totals(found: Plan) -> dict[tuple[str, str, bool], float]:
    (row,) = [row for row in found.passes if row.trains]
    keys = [(one.setting.engine, one.setting.precision, one.setting.gradient_checkpointing) for one in row.settings]
    return {key: one.memory.total for key, one in zip(keys, row.settings, strict=True)}


def test_a_pass_that_trains_is_planned_under_every_setting(write: WriteRecipe) -> None:
    found = plan(write)
    assert len(totals(found)) == 6 * 2 * 2
    own = totals(found)["local", "fp32", False]
    assert own == found.passes[1].memory.total
    assert found.fits
    assert found.advice is None


def test_the_advice_fits_and_is_the_quickest_of_what_fits(write: WriteRecipe) -> None:
    limits = totals(plan(write))
    # Room for the leanest setting alone.
    tight = replace(GPU, memory=(min(limits.values()) + 1) / (1 - RESERVE))
    found = plan(write, tight)
    assert not found.fits
    assert found.advice is not None
    advised = found.advice.setting
    assert limits[advised.engine, advised.precision, advised.gradient_checkpointing] == min(limits.values())
    told = plan_text(found, settings=True)
    assert f"  training: {{engine: {advised.engine}, " in told
    # Written into the recipe it does fit.
    (line, *_) = found.advice.lines()
    mended = plan(write, tight, line.removeprefix("training: "))
    assert mended.passes[1].fits


def test_what_does_not_fit_at_once_is_advised_in_micro_batches(write: WriteRecipe) -> None:
    one = replace(GPU, count=1)
    whole, parts = (totals(plan(write, one, text))["local", "bf16", True] for text in ("{}", "{micro_batch: 1}"))
    assert parts < whole
    tight = replace(one, memory=(parts + 1) / (1 - RESERVE))
    found = plan(write, tight)
    assert found.advice is not None
    assert found.advice.lines() == [
        "training: {engine: local, precision: bf16, gradient_checkpointing: true, micro_batch: 1}"
    ]
    mended = plan(write, tight, found.advice.lines()[0].removeprefix("training: "))
    assert mended.fits
    assert mended.passes[1].batch == found.passes[1].batch
    assert "with local, bf16, gradient checkpointing, micro batch 1, batch 2" in plan_text(mended, settings=True)


def test_a_clip_that_fits_no_gpu_is_advised_on_several(write: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else fits. The batch stays: one group computes its clips in turn."""
    sizes = {"outside": 1e9, "blocks": 40e9, "block": 1e9, "backward": 2e9, "streams": 4e9}
    sizes |= {"stream": 1e8, "inference": 1e8}
    large = SavedActivations(**{name: Bytes(fixed=0.0, sample=size) for name, size in sizes.items()})
    monkeypatch.setattr(planning, "saved_activations", lambda *arguments, **more: large)
    found = plan(write, replace(GPU, memory=6e9), "{engine: fsdp2, processes: 2}")
    assert min(totals(found).values()) > 7e9
    assert found.advice is not None
    (line,) = found.advice.lines()
    assert line == (
        "training: {engine: ddp, precision: bf16, gradient_checkpointing: true, micro_batch: 1, "
        "sequence_parallel: 2, processes: 2}"
    )
    mended = plan(write, replace(GPU, memory=6e9), line.removeprefix("training: "))
    assert mended.fits
    told = plan_text(mended, settings=True)
    assert "with ddp, bf16, gradient checkpointing, micro batch 1, 2 GPUs a clip, batch 2" in told


@pytest.mark.parametrize("key", ["sequence_parallel", "shard_size"])
def test_a_group_that_the_gpus_do_not_divide(write: WriteRecipe, key: str) -> None:
    recipe = load_recipe(write(f"training: {{engine: fsdp2, {key}: 2}}\n{PASSES}"))
    message = rf"tiny\.yaml:\d+: training\.{key}: 2 given, expected a divisor of the 3 processes"
    with pytest.raises(RequestError, match=message):
        make_plan(recipe, machine=replace(GPU, count=3))


def test_weights_that_some_of_the_gpus_split(write: WriteRecipe) -> None:
    """It is a setting of fsdp2 alone: what the table has of the other engines stays."""
    machine = replace(GPU, memory=1e12)
    plain, split = (plan(write, machine, f"{{engine: fsdp2, {more}}}") for more in ("processes: 2", "shard_size: 2"))
    assert totals(plain) == totals(split)
    assert "with fsdp2, fp32, weights split over 2, batch 2" in plan_text(split, settings=True)
    assert gpu_machine(load_recipe(write(f"training: {{engine: fsdp2, shard_size: 2}}\n{PASSES}")), "h100").count == 2


def test_a_gpu_computes_while_it_exchanges_what_can_wait(write: WriteRecipe) -> None:
    """DeepSpeed's ZeRO-1 and 2 compute nothing meanwhile. On links of no known speed exchanges take no time."""
    settings = {
        name: {one.setting.engine: one for one in plan(write, machine).passes[1].settings}
        for name, machine in (
            ("none", GPU),
            ("quick", replace(GPU, link=1e12, network=1.0)),
            ("slow", replace(GPU, link=1e3, network=1.0)),
        )
    }
    sent = settings["slow"]["ddp"].exchanges.hidden
    assert sent.between == 0.0 < sent.within
    for engine in ("ddp", "fsdp2", "zero3", "zero2"):
        none, quick, slow = (settings[name][engine] for name in ("none", "quick", "slow"))
        assert (none.exchanging, none.seconds) == (0.0, none.computing)
        assert quick.exchanging == pytest.approx(slow.exchanging / 1e9)
        waits = engine == "zero2"
        assert quick.seconds == quick.computing + waits * quick.exchanging
        assert slow.seconds == slow.exchanging + waits * slow.computing
    assert settings["slow"]["ddp"].exchanging == pytest.approx(10 * sent.within / 1e3)
    assert settings["slow"]["local"].seconds == settings["none"]["local"].seconds


@pytest.mark.parametrize(("network", "size"), [(1e12, None), (1e6, 8)], ids=["quick", "slow"])
def test_weights_are_split_within_machines_where_links_between_them_are_slow(
    write: WriteRecipe, network: float, size: int | None
) -> None:
    """And where that fits: a machine's part is twice that of two machines."""
    two = replace(GPU, count=16, link=1e12, network=network)
    leanest = min(totals(plan(write, two)).values())
    found = plan(write, replace(two, memory=1.5 * leanest / (1 - RESERVE))).advice
    assert found is not None
    assert (found.setting.engine, found.setting.shard_size) == ("fsdp2", size)
    assert ("shard_size: 8" in found.lines()[0]) == (size == 8)
    tight = plan(write, replace(two, memory=1.01 * leanest / (1 - RESERVE))).advice
    assert tight is not None
    assert tight.setting.shard_size is None


def test_times_apart(write: WriteRecipe) -> None:
    found = plan(write, replace(GPU, link=1e3, network=1e3), "{engine: fsdp2, processes: 2}")
    text = plan_text(found)
    assert "forwards computing exchanges time memory" in " ".join(text.split())
    hours = found.exchanging / 3600
    assert f"({found.computing / 3600:,.1f} hours of computing, {hours:,.1f} hours of exchanges at 70 % of the" in text
    assert found.to_dict()["exchanging_hours"] == hours > 0.1
    assert "exchanges" not in plan_text(plan(write))


def test_nothing_fits(write: WriteRecipe) -> None:
    found = plan(write, replace(GPU, memory=1.0))
    assert found.advice is None
    assert "nothing fits on any number of these GPUs; score runs on one GPU whatever the engine" in plan_text(found)


def test_a_batch_that_the_processes_do_not_divide(write: WriteRecipe) -> None:
    recipe = load_recipe(write(f"training: {{engine: fsdp2}}\n{PASSES}"))
    with pytest.raises(
        RequestError, match=r"tiny\.yaml:\d+: passes\[1\]\.cut\.batch: 2 given, expected a multiple of the 3"
    ):
        make_plan(recipe, machine=replace(GPU, count=3))


@pytest.mark.parametrize(
    ("count", "memory", "told"),
    [
        (16, "80X", "--memory: 80X given, expected a size such as 80G or 48GiB"),
        (16, "0G", "--memory: 0G given, expected a size such as 80G or 48GiB"),
        (0, "80G", "--gpus: 0 given, expected 1 or more"),
        (16, None, "--gpus: 16 given, but training.processes of the recipe is 2; leave one of them out, "
                   "or --set training.processes=16"),
    ],
)  # fmt: skip
def test_wrong_requests(write: WriteRecipe, count: int, memory: str | None, told: str) -> None:
    processes = "2" if memory is None else "null"
    recipe = load_recipe(write(f"training: {{engine: ddp, processes: {processes}}}\n{PASSES}"))
    with pytest.raises(RequestError) as caught:
        gpu_machine(recipe, "h100", count, memory)
    assert str(caught.value) == told


def test_gpus_of_a_size(write: WriteRecipe) -> None:
    recipe = load_recipe(write(PASSES))
    assert gpu_machine(recipe, "h100", 16, "48GiB").memory == 48 * 2**30
    assert gpu_machine(recipe, "h100").memory == 80e9


@pytest.mark.parametrize(
    ("name", "size", "here"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, ("h100", None)),
        ("NVIDIA A100-SXM4-40GB", 42.3e9, ("a100", "42G")),
        ("NVIDIA GeForce RTX 4090", 25.3e9, ("rtx4090", None)),
        ("NVIDIA Tesla T4", 15.6e9, (None, None)),
    ],
)
def test_this_machines_gpu(
    name: str, size: float, here: tuple[str | None, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu_here() == (None, None) or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, size))
    assert gpu_here() == here
