"""Distribution matching whose roles share one frozen model, through the pass manager and on several processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.core.program import Program
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.passes.dmd import DistributionMatching
from flcompress.progress import QuietDisplay
from flcompress.tracing.skip import graph_of, skip
from flcompress.training.engines import replicated
from flcompress.training.role import TrainedRole
from flcompress.training.shared_base import LoRA, SharedBase, merge
from tests.fixtures.rounding import rounding
from tests.fixtures.tiny import tiny_pipeline
from tests.training.comparing import FORWARD, STEP, Smooth, apart, difference, smooth
from tests.training.processes import run

pytestmark = pytest.mark.e2e

LORA = "fake_score: lora, generator: lora, real_score: elastic, lora_rank: 4"
"""On one base."""
APART = "fake_score: lora, generator: lora, lora_rank: 4"
"""The generator on a base of its own."""
MAGIC = f"{LORA}, real_lean: 0.25, gan_weight: 0.5"
"""A real score that leans, and a discriminator."""
RECIPE = """
version: 1
model: model
sampling: {{max_sequence_length: 16}}
data: {{moving-digits: {{clips: 16}}}}
training: {{health: {{on_breach: warn, samples: 0}}, log_to: []}}
passes:
  - stochastic-depth: {{remove: 0.3, by: middle, steps: 2, batch: 2}}
  - prune: {{remove: 0.3, by: middle}}
  - dmd:
      {{steps: 2, critic_updates: 1, student_steps: 2, batch: 2, intra_cfg: [0.2, 0.3], learning_rate: {rate}, {dmd}}}
"""

IGNORE = shutil.ignore_patterns("*-dmd-*")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    tiny_pipeline(folder / "model", layers=4)
    return folder


def applied(folder: Path, name: str, settings: str = LORA, *overrides: str, store: str = "store") -> RunDirectory:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(dmd=settings, rate=1e-2))
    return apply(recipe, folder / name, overrides=overrides, store=folder / store, display=QuietDisplay(), device="cpu")


def logged(run: RunDirectory) -> list[dict[str, float]]:
    lines = (run.entries()[-1].folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(("name", "settings"), [("merged", LORA), ("merged-apart", APART)])
def test_the_finished_generator_is_the_trained_one_in_its_own_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: str
) -> None:
    trained: dict[str, torch.Tensor] = {}

    def watched(weights: Any, lora: Any, paths: Any) -> Any:
        trained.update(lora)
        return merge(weights, lora, paths)

    monkeypatch.setattr("flcompress.training.shared_base.merge", watched)
    run = applied(folder, name, settings)
    program = run.final()
    student = load_transformer(program.components["transformer"])
    pruned = Program.load(next(folder.glob("store/passes/*-prune-*"))).components["transformer"]
    base = load_transformer(pruned if settings == APART else program.components["elastic"])
    blocks = [block.path for block in graph_of(base).blocks]
    assert (len(student.blocks), len(blocks)) == (2, 2 if settings == APART else 4)
    generator = LoRA(SharedBase(base, blocks), blocks if settings == APART else program.kept.values(), 4, seed=0)
    generator.load_state_dict(trained)
    assert all(bool((value != 0).any()) for value in generator.lora_B.values())
    given = example_inputs(base, batch=2)
    with torch.no_grad(), skip(base, () if settings == APART else program.prune_set):
        start = base(**given, return_dict=False)[0]
        expected = generator(**given, return_dict=False)[0]
    with torch.no_grad():
        found = student(**given, return_dict=False)[0]
    different, learned = (float((one - expected).norm() / expected.norm()) for one in (found, start))
    print(f"merged: {different:.1e}, start: {learned:.1e}")
    assert different < rounding(2 * FORWARD)
    assert learned > 100 * rounding(2 * FORWARD)


def test_gradient_checkpointing_and_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks computed again change no loss, and offload no bit; bf16, with the base held in it, stays near."""
    monkeypatch.setattr(replicated, "optimiser", smooth)
    checkpointing = "training.gradient_checkpointing=true"
    plain, again, half = (
        logged(applied(folder, f"smooth-{len(more)}", LORA, *more, store="store-smooth"))
        for more in ((), (checkpointing,), (checkpointing, "training.precision=bf16"))
    )
    assert apart(plain, again) < rounding(4 * STEP)
    offload = "training.offload=[moments,inputs]"  # no part of a cache key
    assert logged(applied(folder, "smooth-away", LORA, checkpointing, offload, store="store-away")) == again
    for one, third in zip(plain, half, strict=True):
        assert third["fake_score_loss"] == pytest.approx(one["fake_score_loss"], rel=0.05)
    assert plain != half


def test_a_run_that_is_killed_goes_on_bit_for_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = applied(folder, "magic", MAGIC)
    store = folder / "store-killed"
    shutil.copytree(folder / "store", store, ignore=shutil.ignore_patterns("*-dmd-*"))
    overrides = ["training.checkpoint_seconds=0"]
    step = TrainedRole._step

    def killed(role: TrainedRole, loss: float) -> dict[str, float]:
        if role.name == "generator" and role.updates == 1:
            raise KeyboardInterrupt
        return step(role, loss)

    with monkeypatch.context() as patch:
        patch.setattr(TrainedRole, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            apply(
                folder / "magic.yaml",
                folder / "killed",
                overrides=overrides,
                store=store,
                display=QuietDisplay(),
                device="cpu",
            )
    (kept,) = store.glob("passes/.work-*/checkpoints/step-*/*.safetensors")
    assert kept.stat().st_size < 3e6  # LoRAs and heads with moments, an average; the base is not in it
    again = apply(
        folder / "magic.yaml",
        folder / "killed",
        overrides=overrides,
        store=store,
        display=QuietDisplay(),
        device="cpu",
    )
    one, other = (load_transformer(run.final().components["transformer"]).state_dict() for run in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert logged(whole) == logged(again)


def test_a_lora_critic_beside_a_full_generator(folder: Path) -> None:
    """The two start from the same weights, so the first loss of the critic is a full one's."""
    full = logged(applied(folder, "full", "real_score: elastic"))
    critic = logged(applied(folder, "critic", "real_score: elastic, fake_score: lora"))
    assert critic[0]["fake_score_loss"] == pytest.approx(full[0]["fake_score_loss"], rel=rounding(2 * FORWARD))
    assert critic[0]["fake_score_grad_norm"] != pytest.approx(full[0]["fake_score_grad_norm"], rel=1e-2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.engine=zero3",
         "training.engine: zero3 given with LoRA roles in dmd, expected local, ddp, zero1, zero2 or fsdp2: DeepSpeed "
         "does not split weights that a LoRA is attached to; use fsdp2"),
        ("training.compile=true",
         "training.compile: true given with LoRA roles in dmd, expected false: every role's every layer would be "
         "compiled by itself; set it to false, or fake_score and generator to full"),
    ],
)  # fmt: skip
def test_trainings_that_cannot_be_are_refused_before_any_work(folder: Path, override: str, message: str) -> None:
    with pytest.raises(RequestError) as told:
        applied(folder, "refused", LORA, override)
    assert str(told.value) == message
    assert not (folder / "refused").exists()


def _never(*given: Any) -> Any:
    raise AssertionError("refused before any work")


def test_a_generator_that_did_not_start_from_the_base_is_refused(folder: Path) -> None:
    run = applied(folder, "plain")
    program = Program.load(run.entries()[2].folder)
    odd = program.with_component("elastic", program.components["original"])
    step = DistributionMatching(steps=1, generator="lora", real_score="elastic")
    work = _work(folder)
    with pytest.raises(RequestError) as told:
        step.apply(odd, work)
    assert str(told.value).startswith("dmd.generator: lora given, but ")
    assert str(told.value).endswith(
        " of the transformer is not that of the elastic one, whose weights a LoRA would start from; "
        "set real_score: original or generator: full"
    )


def _work(folder: Path) -> Any:
    from flcompress.core.steps import PassContext

    return PassContext(directory=folder, seed=0, data=_never, progress=_never)


def test_the_plan_counts_the_base_once_and_what_is_trained() -> None:
    step = DistributionMatching(steps=1, fake_score="lora", generator="lora", real_score="elastic", lora_rank=16)
    generator, fake, base = step.cost(7e8, 21, 1e9).roles
    assert (base.name, base.parameters, base.trained) == ("shared base", 1e9, False)
    assert generator.trained
    assert generator.averaged
    assert fake.trained
    assert 7e8 / 100 < generator.parameters < 7e8 / 10
    assert fake.parameters / generator.parameters == pytest.approx(1 / 0.7)
    assert (generator.runs, fake.runs) == (7e8, 1e9)
    assert "zero3" not in step.engines
    assert {"ddp", "zero2", "fsdp2"} < set(step.engines)
    apart = DistributionMatching(steps=1, generator="lora").cost(7e8, 21, 1e9)
    assert [(role.name, role.parameters, role.trained) for role in apart.roles[1:]] == [
        ("fake score", 1e9, True),
        ("real score", 1e9, False),
        ("generator's base", 7e8, False),
    ]
    full = DistributionMatching(steps=1).cost(7e8, 21, 1e9)
    assert [role.name for role in full.roles] == ["generator", "fake score", "real score"]
    assert step.cost(7e8, 21, 1e9).forwards < full.forwards


RECOMPUTED = "gradient_checkpointing=true"
"""Part of a cache key, so both sides have it."""
SPLIT = (RECOMPUTED, "sequence_parallel=2")
"""One clip on both processes."""
AWAY = (*SPLIT, "offload=[moments,inputs]")
"""In addition, moments and the inputs of blocks in host memory."""


@pytest.fixture(scope="module")
def alone(folder: Path) -> Callable[[str, str, bool], Path]:
    """What trains roles on one process, once for each; returns the run directory."""

    @cache
    def train(name: str, settings: str, recomputed: bool) -> Path:
        options = (RECOMPUTED,) if recomputed else ()
        applied(folder, name, settings, *(f"training.{option}" for option in options))
        return smoothly(folder, name, settings, "local", 1, options)

    return train


def smoothly(folder: Path, name: str, settings: str, engine: str, processes: int, options: Sequence[str]) -> Path:
    """Train roles smoothly; the passes before are those of the store. Returns the run directory."""
    recipe = folder / f"smooth-{name}.yaml"
    recipe.write_text(RECIPE.format(dmd=f"{settings}, critic_learning_rate: 0.1", rate=0.1))
    place = folder / f"{engine}-{name}-{processes}-{len(options)}"
    store = shutil.copytree(folder / "store", folder / f"store-{place.name}", ignore=IGNORE)
    sets = [word for option in (f"engine={engine}", *options) for word in ("--set", f"training.{option}")]
    command: list[str | Path] = ["apply", recipe, "--run-dir", place, "--store", store, "--quiet", *sets]
    hooks = dict.fromkeys(range(processes), Smooth())
    run(command, folder / f"output-{place.name}", processes=processes, hooks=hooks)
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "name", "settings", "options"),
    [
        ("ddp", "plain", LORA, ()),
        ("zero2", "apart", APART, ()),
        ("fsdp2", "magic", MAGIC, ()),
        ("fsdp2", "apart", APART, AWAY),
        ("zero1", "magic", MAGIC, SPLIT),
    ],
)
def test_two_processes_agree_with_one(
    folder: Path,
    alone: Callable[[str, str, bool], Path],
    engine: str,
    name: str,
    settings: str,
    options: Sequence[str],
) -> None:
    one = alone(name, settings, RECOMPUTED in options)
    found = difference(folder / "model", one, smoothly(folder, name, settings, engine, 2, options))
    print(f"{engine}, {name}: {found}")
    found.require(updates=4)  # two of each role
