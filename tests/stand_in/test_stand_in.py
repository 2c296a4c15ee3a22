"""Placement, synchronisations and kernels of every part on a device that says it is cuda, for five families."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: the stand-in device compiles its hooks"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA, whose hooks stay its own"),
]

FAMILIES = ("wan", "hunyuan-video", "cogvideox")
PLACED = (*FAMILIES, "ltx", "mochi")
"""Families whose placement and precision are checked; the classes of the last two wait for the device on their own."""
UPDATES = ("update of stochastic_depth", "update of fake_score", "update of generator", "update of student")
PHASES = ("encode", "importance", "stochastic-depth", "dmd", "consistency", "evaluation", "generate", *UPDATES)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("stand-in") / "counts.json"
    command = [sys.executable, "-m", "tests.stand_in.run", str(out), *PLACED]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_the_device_refuses_what_cuda_refuses(counts: dict[str, Any]) -> None:
    assert counts["refused"] == ["mixture", "weight", "index", "generator", "numpy"]


def test_the_plan_has_the_autocast_of_the_device(counts: dict[str, Any]) -> None:
    """What a GPU computes in fp32 takes twice the memory that a CPU's rules give it."""
    dtypes = counts["autocast"]
    assert {name: plan for name, (_, plan, _) in dtypes.items()} == {name: cuda for name, (cuda, *_) in dtypes.items()}
    differ = {name for name, (cuda, _, cpu) in dtypes.items() if cuda != cpu}
    assert {"rms_norm", "layer_norm", "softmax", "pow"} <= differ


def test_what_waits_in_host_memory_changes_no_bit(counts: dict[str, Any]) -> None:
    plain, away = counts["offload"]
    assert away["held"] == plain["held"]
    assert {device for name, device in plain["where"].items() if "updates" not in name} == {"cuda"}
    kinds = ("model/model.", "model/ema.", "exp_avg.", "exp_avg_sq.", "step.")
    where = {kind: {device for name, device in away["where"].items() if kind in name} for kind in kinds}
    assert list(where.values()) == [{"cuda"}, {"cpu"}, {"cpu"}, {"cpu"}, {"cuda"}]
    assert "offload.py" in away["uploads"]
    assert "offload.py" not in plain["uploads"]


@pytest.mark.parametrize("family", PLACED)
def test_no_devices_are_mixed(counts: dict[str, Any], family: str) -> None:
    """Encoding, every stage with its held-out evaluations, export and generation, of which each uses the device."""
    assert "error" not in counts[family], counts[family]["error"]
    assert set(PHASES) <= {phase for phase, number in counts[family]["operations"] if number > 100}


def test_no_devices_are_mixed_in_other_passes(counts: dict[str, Any]) -> None:
    """Adversarial term, LoRA roles, joint selection, recovery, pretraining; frame-local attention, eval, bench."""
    assert counts["other passes"] == {}


@pytest.mark.parametrize("family", PLACED)
def test_all_work_of_the_transformer_is_in_half_precision(counts: dict[str, Any], family: str) -> None:
    for phase in ("importance", "evaluation", *UPDATES):
        work = {dtype: flops for name, dtype, flops in counts[family]["products"] if name == phase}
        assert work["bf16"] > 0.99 * sum(work.values()), phase
        kernels = {kernel for name, kernel, *_ in counts[family]["attention"] if name == phase}
        assert {kernel.split()[1] for kernel in kernels} == {"bf16"}, phase


@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_waits_for_the_device_twice(counts: dict[str, Any], family: str) -> None:
    """For its loss with all figures, and for the norm of the gradients; a look waits once for all moments."""
    for phase in UPDATES:
        waits = [(what, line, number) for name, what, line, number in counts[family]["waits"] if name == phase]
        assert sum(number for *_, number in waits) == 2, waits
    waits = [(what, line, number) for name, what, line, number in counts[family]["waits"] if name == "evaluation"]
    looks = [number for what, line, number in waits if line.startswith(("samples", "held_out"))]
    assert sum(looks) <= 20, waits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_inputs_of_an_update_are_copied_from_page_locked_memory(counts: dict[str, Any], family: str) -> None:
    """None holds up the host but, in `consistency`, the grid's levels and the positions that it computes from them."""
    for phase in UPDATES:
        uploads = [(line, kind, number) for name, line, kind, number in counts[family]["uploads"] if name == phase]
        assert "feed.py" in {line.split(":")[0] for line, kind, _ in uploads if kind == "page-locked"}
        pageable = sum(number for _, kind, number in uploads if kind == "pageable")
        assert pageable <= (3 if phase == "update of student" else 0), uploads


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_networks_compute_without_autocast(counts: dict[str, Any], family: str) -> None:
    """Under CUDA's autocast queries and keys would leave their norms in fp32, which flash attention 3 does not take."""
    rows = [tuple(row[:4]) for row in counts[family]["attention"]]
    plain = {(phase, dtypes) for phase, _, dtypes, autocast in rows if not autocast and phase != "encode"}
    assert {phase for phase, dtypes in plain if dtypes == "bf16/bf16/bf16"} == {
        "importance", "stochastic-depth", "evaluation", "generate", "update of stochastic_depth", "update of generator",
        "update of student",
    }  # fmt: skip
    assert {phase for phase, dtypes in plain if dtypes != "bf16/bf16/bf16"} <= {"generate"}  # the text encoder
    under = {phase for phase, _, _, autocast in rows if autocast}
    assert under == {"evaluation", *UPDATES}  # those of trained networks


def test_prompts_of_one_length_reach_flash_attention(counts: dict[str, Any]) -> None:
    """In HunyuanVideo, whose class masks every token; the refiner of the text, one block, keeps its mask.

    Of the four others the student has two at least.
    """
    calls: Counter[tuple[str, str]] = Counter()
    for phase, kernel, *_, number in counts["hunyuan-video"]["attention"]:
        calls[phase, kernel.split()[0]] += number
    for phase in ("importance", *UPDATES):
        assert calls[phase, "flash"] >= 2 * calls[phase, "memory-efficient"], phase
    assert calls["generate", "flash"] > 0  # text encoders mask
