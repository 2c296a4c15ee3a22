"""Autoencoders take clips whole, and in tiles only where the memory is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flcompress.models import video
from flcompress.models.tensor_memory import Alive
from flcompress.models.video import decode_latents, encode_clips

pytestmark = pytest.mark.e2e


def hunyuan_video() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def wan() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ).eval()


def pictures() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What was counted, of clips of any size."""
    count, found = video._most_alive, []

    def counted(*given: Any) -> int:
        found.append(count(*given))
        return found[-1]

    monkeypatch.setattr(video, "_most_alive", counted)
    monkeypatch.setattr(video, "SMALL", {"encode": 0, "decode": 0})
    return found


@pytest.mark.parametrize("build", [hunyuan_video, wan, pictures])
def test_what_a_clip_takes_is_counted_without_taking_it(build: Callable[[], Any], asked: list[int]) -> None:
    vae, clips = build(), torch.zeros(1, 3, 5, 64, 64)
    latents = encode_clips(vae, clips)
    for call, given in ((encode_clips, clips), (decode_latents, latents)):
        call(vae, given)  # counted now, and remembered
        alive = Alive()
        with alive:
            call(vae, given)
        assert not vae.use_tiling
        assert asked[-1] == pytest.approx(alive.most, rel=0.1)


@pytest.mark.parametrize(("room", "slicing", "tiles"), [(10.0, False, False), (1.5, True, False), (0.5, True, True)])
def test_tiles_come_last(
    room: float, slicing: bool, tiles: bool, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples one by one change nothing; tiles do, so only where one sample does not fit."""
    vae, latents = hunyuan_video(), torch.randn(2, 4, 1, 40, 40)
    whole = decode_latents(vae, latents)
    monkeypatch.setattr(video, "_free_bytes", lambda device: room * asked[0] / (1.0 - video.SPARE))
    made = decode_latents(vae, latents)
    assert (vae.use_slicing, vae.use_tiling) == (slicing, tiles)
    assert made.shape == whole.shape
    assert (float((made - whole).abs().max()) < 1e-4) == (not tiles)
    monkeypatch.setattr(video, "_free_bytes", lambda device: 1 << 40)
    assert torch.equal(decode_latents(vae, latents), whole), "tiles outlast the need for them"


def test_small_clips_are_never_asked_about(asked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the embedded benchmark: they stay bit for bit what they were, however little memory is free."""
    monkeypatch.undo()
    monkeypatch.setattr(video, "_free_bytes", lambda device: 0)
    vae = wan()
    video.make_room(vae, torch.zeros(64, 3, 9, 64, 64), "encode")
    video.make_room(vae, torch.zeros(64, 4, 3, 8, 8), "decode")
    assert not vae.use_tiling
    assert not vae.use_slicing
