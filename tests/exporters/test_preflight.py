"""What would end a long export late is found before, and the message says how to mend it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flcompress.core.program import Program
from flcompress.errors import RequestError
from flcompress.exporters.shared import preflight
from flcompress.runtime.sizes import Size

WAN = {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 12}
HD = Size(batch=1, frames=21, height=90, width=160)
SD = Size(batch=1, frames=21, height=60, width=104)


def test_tokens_are_counted_in_patches() -> None:
    assert preflight.attention_tokens(WAN, HD, 512) == 75_600
    assert preflight.attention_tokens(WAN, SD, 512) == 32_760
    flux = {"_class_name": "FluxTransformer2DModel", "patch_size": 1}
    assert preflight.attention_tokens(flux, Size(batch=1, frames=1, height=128, width=128), 512) == 4096 + 512
    cog = {"_class_name": "CogVideoXTransformer3DModel", "patch_size": 2, "patch_size_t": 2}
    assert preflight.attention_tokens(cog, Size(batch=1, frames=3, height=8, width=8), 226) == 2 * 16 + 226


def test_more_keys_than_an_fp16_softmax_takes() -> None:
    preflight.check_keys("bf16", 75_600, "it")
    preflight.check_keys("fp16", 65_504, "it")
    with pytest.raises(RequestError) as caught:
        preflight.check_keys("fp16", 75_600, preflight.describe_size(HD))
    assert str(caught.value) == (
        "onnx.precision: fp16 given, but 21 x 90 x 160 of latents is 75,600 tokens and an fp16 softmax overflows past "
        "65,504 keys; set onnx.precision: bf16"
    )


def test_more_scores_than_a_tensor_takes() -> None:
    preflight.check_scores("bf16", 12, 1, 32_760, "it")
    preflight.check_scores("fp32", 2, 1, 32_760, "it")
    with pytest.raises(RequestError) as caught:
        preflight.check_scores("fp32", 12, 1, 32_760, preflight.describe_size(SD))
    assert str(caught.value) == (
        "tensorrt: 21 x 60 x 104 of latents is 32,760 tokens, whose fp32 attention scores are 12,878,611,200 elements "
        "of one tensor, and TensorRT takes fewer than 2,147,483,648; it fuses attention in half precision only: set "
        "onnx.precision: bf16"
    )


def test_too_little_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000_000))
    with pytest.raises(RequestError) as caught:
        preflight.check_room("onnx", tmp_path, 2_100_000_000, 0)
    assert str(caught.value) == (
        f"onnx: 2.1 GB of disk needed, 1.0 GB free at {tmp_path}; free some, or give --run-dir on another disk"
    )


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000_000))
    with pytest.raises(RequestError) as caught:
        preflight.check_room("tensorrt", tmp_path, 0, 6_900_000_000)
    assert str(caught.value) == (
        "tensorrt: about 6.9 GB of memory needed, 4.0 GB available; close other programs, set onnx.precision: bf16, or "
        "run 'flcompress export' on a larger machine"
    )


def test_bytes_of_weights_count_the_islands(program: Program) -> None:
    folder = program.components["transformer"]
    full, half = (preflight.weight_bytes(folder, precision) for precision in ("fp32", "bf16"))
    assert full == 4 * program.graph.parameters
    assert full // 2 < half < full
