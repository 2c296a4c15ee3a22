"""Every way in which a recipe and a launcher can disagree, refused with one line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from flcompress.core.settings import Training
from flcompress.core.steps import Pass
from flcompress.distributed.launch import Launch
from flcompress.driver.launch_check import check_attention, check_launch, check_sequence
from flcompress.errors import RequestError
from flcompress.passes.feature_distill import FeatureDistill
from tests.training.toy import Toy

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
HALF = "a launcher sets all of them: start with torchrun or accelerate launch, or unset them to run one process"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *NAMES,
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE",
        "ACCELERATE_MIXED_PRECISION",
    ):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_one_process_runs() -> None:
    assert Launch.from_environment() == Launch(0, 1, 0)


def test_what_a_launcher_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    assert Launch.from_environment() == Launch(1, 2, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "1"}, f"environment: RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR; {HALF}"),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            f"environment: RANK, WORLD_SIZE set, but not LOCAL_RANK, MASTER_PORT, MASTER_ADDR; {HALF}",
        ),
        (
            {"WORLD_SIZE": "2"},
            f"environment: WORLD_SIZE set, but not RANK, LOCAL_RANK, MASTER_PORT, MASTER_ADDR; {HALF}",
        ),
        ({**WHOLE, "RANK": "one"}, "environment: RANK=one given, expected a whole number"),
        ({**WHOLE, "WORLD_SIZE": "-2"}, "environment: WORLD_SIZE=-2 given, expected a whole number"),
        ({**WHOLE, "RANK": "2"}, "environment: RANK=2 given with WORLD_SIZE=2, expected a smaller RANK"),
    ],
)  # fmt: skip
def test_an_environment_that_is_half_set(
    monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str], message: str
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        Launch.from_environment()


@pytest.mark.parametrize(
    ("training", "size", "environment", "message"),
    [
        (
            {"engine": "ddp", "processes": 4}, 2, {},
            "training.processes: 4 given, but the launcher started 2 (WORLD_SIZE); start with "
            "torchrun --nproc-per-node 4 -m flcompress apply RECIPE, or change it",
        ),
        (
            {"engine": "ddp", "processes": 2}, 4, {},
            "training.processes: 2 given, but the launcher started 4 (WORLD_SIZE); start with "
            "torchrun --nproc-per-node 2 -m flcompress apply RECIPE, or change it",
        ),
        (
            {"engine": "local"}, 2, {},
            "training.engine: local given, but the launcher started 2 processes (WORLD_SIZE); "
            "set it to ddp, zero1, zero2, zero3 or fsdp2, or start one",
        ),
        (
            {"engine": "zero2"}, 1, {"ACCELERATE_USE_CPU": "true"},
            "training.engine: zero2 given, but only one process runs (WORLD_SIZE is unset or 1; `accelerate launch "
            "--cpu` always starts one); start with torchrun --nproc-per-node 2 -m flcompress apply "
            "RECIPE, or set training.processes: 1 if one is meant",
        ),
        (
            {"engine": "ddp"}, 2, {"ACCELERATE_USE_DEEPSPEED": "true"},
            "training.engine: ddp given, but accelerate was configured for zero1 or zero2 or zero3 "
            "(ACCELERATE_USE_DEEPSPEED); set one like the other",
        ),
        (
            {"engine": "zero3"}, 2, {"ACCELERATE_USE_FSDP": "true"},
            "training.engine: zero3 given, but accelerate was configured for fsdp2 (ACCELERATE_USE_FSDP); "
            "set one like the other",
        ),
        (
            {"engine": "zero2"}, 2, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "training.engine: zero2 given, but accelerate was configured for ZeRO stage 3 "
            "(ACCELERATE_DEEPSPEED_ZERO_STAGE); set one like the other",
        ),
        (
            {"engine": "ddp"}, 2, {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "training.precision: fp32 given, but accelerate was configured for fp16 (ACCELERATE_MIXED_PRECISION); "
            "set one like the other",
        ),
        (
            {"engine": "ddp", "sequence_parallel": 4}, 2, {},
            "training.sequence_parallel: 4 given, expected a divisor of the 2 processes that the launcher started "
            "(WORLD_SIZE)",
        ),
        (
            {"engine": "fsdp2", "shard_size": 8}, 12, {},
            "training.shard_size: 8 given, expected a divisor of the 12 processes that the launcher started "
            "(WORLD_SIZE)",
        ),
    ],
)  # fmt: skip
def test_a_recipe_and_a_launcher_that_disagree(
    monkeypatch: pytest.MonkeyPatch, training: Any, size: int, environment: Mapping[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_launch(Training(**training), Launch(0, size, 0))


def test_a_batch_that_the_processes_do_not_divide() -> None:
    message = "toy: batch 3 given, expected a multiple of the 2 processes; change either"
    with pytest.raises(RequestError, match=f"^{message}$"):
        check_launch(Training(engine="ddp"), Launch(0, 2, 0), [Toy(steps=1, batch=3)])
    message = "toy: batch 3 given, expected a multiple of the 2 groups of 2 processes; change either"
    with pytest.raises(RequestError, match=f"^{message}$"):
        check_launch(Training(engine="ddp", sequence_parallel=2), Launch(0, 4, 0), [Toy(steps=1, batch=3)])


@pytest.mark.parametrize(
    ("training", "size"),
    [
        ({"engine": "local"}, 1),
        ({"engine": "ddp", "processes": 2}, 2),
        ({"engine": "fsdp2", "processes": 1}, 1),
        ({"engine": "zero2", "sequence_parallel": 2}, 8),
        ({"engine": "fsdp2", "shard_size": 2}, 4),
    ],
)
def test_a_recipe_and_a_launcher_that_agree(training: Any, size: int) -> None:
    check_launch(Training(**training), Launch(0, size, 0), [Toy(steps=1, batch=4)])


@pytest.mark.parametrize(
    ("settings", "pipeline", "device", "message"),
    [
        (
            {"attention": "flash"}, "WanPipeline", "cuda",
            "training.attention: flash given, which computes in half precision only; set training.precision: bf16, or "
            "attention: native",
        ),
        (
            {"attention": "flash", "precision": "bf16"}, "LTXPipeline", "cuda",
            "training.attention: flash given, but LTXPipeline masks its attention, which flash attention cannot; set "
            "it to efficient, cudnn or native",
        ),
        (
            {"attention": "flash", "precision": "bf16"}, "HunyuanVideoPipeline", "cuda",
            "training.attention: flash given, but HunyuanVideoPipeline masks prompts of different lengths in one "
            "forward, which flash attention cannot; set training.micro_batch: 1, or attention to efficient, cudnn or "
            "native",
        ),
        (
            {"attention": "flash", "precision": "bf16", "micro_batch": 1, "compile": True}, "HunyuanVideoPipeline",
            "cuda",
            "training.attention: flash given with compile: true, which keeps the masks of HunyuanVideoPipeline; leave "
            "out either",
        ),
        ({"attention": "flash", "precision": "bf16", "micro_batch": 1}, "HunyuanVideoPipeline", "cuda", None),
        (
            {"attention": "cudnn", "precision": "bf16"}, "WanPipeline", "cpu",
            "training.attention: cudnn given, a kernel of GPUs, but this machine has none that torch can use; set it "
            "to native",
        ),
        ({"attention": "flash", "precision": "bf16"}, "WanPipeline", "cuda", None),
        (
            {"attention": "math"}, "CogVideoXPipeline", "cpu",
            "training.attention: math given, but CogVideoXTransformer3DModel has no choice of kernels in this "
            "diffusers; set it to native",
        ),
        ({"attention": "efficient"}, "HunyuanVideoPipeline", "cuda", None),
        ({}, "HunyuanVideoPipeline", "cpu", None),
    ],
)  # fmt: skip
def test_a_kernel_of_attention_that_cannot_run(
    settings: dict[str, Any], pipeline: str, device: str, message: str | None
) -> None:
    training, configs = Training(**settings), Path(__file__).parents[2] / "recipes" / "configs"
    folder = {"WanPipeline": "wan2.1-t2v-1.3b", "HunyuanVideoPipeline": "hunyuanvideo"}.get(pipeline, "cogvideox-5b")
    if message is None:
        check_attention(training, pipeline, configs / folder / "transformer", device)
        return
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_attention(training, pipeline, configs / folder / "transformer", device)


def test_kernels_and_repeatability_are_no_part_of_a_key() -> None:
    assert Training(attention="math", deterministic=True).decisive == Training().decisive


@pytest.mark.parametrize(
    ("settings", "passes", "model", "latents", "message"),
    [
        (
            {"engine": "local"}, [], "wan2.1-t2v-14b", (21, 90, 160),
            "training.sequence_parallel: 8 given with engine: local, which is one process; set it to ddp or fsdp2",
        ),
        (
            {"compile": True}, [], "wan2.1-t2v-14b", (21, 90, 160),
            "training.sequence_parallel: 8 given with compile: true, which do not combine; leave out either",
        ),
        (
            {}, [FeatureDistill(steps=1)], "wan2.1-t2v-14b", (21, 90, 160),
            "training.sequence_parallel: 8 given with feature-distill, which needs whole clips in each process; set it "
            "to 1",
        ),
        (
            {}, [], "wan2.1-t2v-1.3b", (21, 60, 104),
            "training.sequence_parallel: 8 given, expected a divisor of the 12 attention heads of "
            "WanTransformer3DModel",
        ),
        (
            {}, [], "hunyuanvideo", (1, 2, 14),
            "training.sequence_parallel: 8 given, but a clip of latents 1 x 2 x 14 has 7 tokens; expected at least one "
            "for each process",
        ),
        ({}, [], "hunyuanvideo", (1, 2, 18), None),
        ({}, [], "cogvideox-5b", (13, 60, 90), None),
    ],
)  # fmt: skip
def test_clips_that_processes_cannot_compute_together(
    settings: dict[str, Any], passes: list[Pass], model: str, latents: tuple[int, int, int], message: str | None
) -> None:
    folder = Path(__file__).parents[2] / "recipes" / "configs" / model / "transformer"
    training = Training(**{"engine": "fsdp2", "sequence_parallel": 8, **settings})
    if message is None:
        check_sequence(training, passes, folder, latents)
        return
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_sequence(training, passes, folder, latents)


def test_a_class_whose_tokens_cannot_be_split(tmp_path: Path) -> None:
    """Blocks of this configuration count the tokens of the first frame."""
    source = Path(__file__).parents[2] / "recipes" / "configs" / "hunyuanvideo" / "transformer" / "config.json"
    config = json.loads(source.read_text()) | {"image_condition_type": "token_replace"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = (
        "training.sequence_parallel: 2 given, but the tokens of HunyuanVideoTransformer3DModel, as "
        f"{tmp_path / 'config.json'} configures it, cannot be split over processes (docs/training.md names the "
        "classes); set it to 1"
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        check_sequence(Training(engine="ddp", sequence_parallel=2), [], tmp_path, (4, 8, 8))
