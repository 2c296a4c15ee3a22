"""Pictures of a training: one that cannot be drawn is reported, and never ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.core.program import Program
from flcompress.core.steps import PassContext
from flcompress.models.parts import Parts
from flcompress.training.watching import strips
from flcompress.training.watching.strips import draw_strip, strip_of

LATENTS = torch.randn(2, 4, 3, 8, 8)


class OnlyParts(Program):
    def __init__(self) -> None:
        pass

    def parts(self, device: str = "cpu", autoencoder: torch.dtype | None = None) -> Any:
        return Drawn(device, autoencoder)


class Drawn:
    seen: list[tuple[str, torch.dtype | None]] = []  # noqa: RUF012

    def __init__(self, *given: Any) -> None:
        self.seen.append((given[0], given[1]))

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 3, 9, 16, 16)


def work_in(folder: Path, said: list[str], device: str = "cpu") -> PassContext:
    return PassContext(
        directory=folder,
        seed=0,
        data=lambda program: pytest.fail("no data"),
        progress=lambda *told: None,
        say=said.append,
        device=device,
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 74.20 GiB"), "OutOfMemoryError: CUDA out of"),
        (RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"), "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_a_picture_that_fails_is_reported_and_trained_on(
    error: Exception, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    freed: list[bool] = []

    def failing(self: Parts, latents: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Drawn, "decode_latents", failing)
    monkeypatch.setattr(strips, "free_gpu_memory", lambda: freed.append(True))
    assert draw_strip(work_in(tmp_path, said), OnlyParts(), LATENTS, strip_of(tmp_path, 40)) == []
    (line,) = said
    assert line.startswith(f"warning: step-00000040.png: not drawn, the training continues: {told}")
    assert "\n" not in line
    assert freed == [True, True]
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", None), ("cuda", torch.bfloat16)])
def test_pictures_are_decoded_in_half_precision_on_a_gpu_alone(
    device: str, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Drawn, "seen", [])
    clips = draw_strip(work_in(tmp_path, said, device), OnlyParts(), LATENTS, strip_of(tmp_path, 0))
    assert [clip.shape for clip in clips] == [(9, 16, 16, 3)] * 2
    assert (Drawn.seen, said) == ([(device, dtype)], [])
    assert strip_of(tmp_path, 0).is_file()
