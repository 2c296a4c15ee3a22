"""Attention within latent frames: against the masked softmax, what it lets through, and the choice of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flcompress.errors import RequestError
from flcompress.ir.block import Estimate
from flcompress.ir.selection import choose
from flcompress.models.families import family_of
from flcompress.models.network import as_network
from flcompress.tracing.boundaries import clip_blocks
from flcompress.tracing.self_attention import FrameLocal, frame_local_blocks, frame_local_network
from flcompress.tracing.skip import graph_of
from flcompress.training.methods import temporal_attention
from flcompress.training.methods.temporal_attention import mass_on_other_frames
from tests.tracing import models

MODELS: dict[str, Callable[[], Any]] = {
    "Wan": lambda: models.wan()[0],
    "CogVideoX": lambda: models.cogvideox()[0],
    "HunyuanVideo": lambda: models.hunyuan_video()[0],
}
"""Without text in the attention, with the text before the clip, and after it."""
TEXT = 5
SHAPE = (3, 8, 8)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[request.param]().eval().requires_grad_(False)


def inputs(model: Any, shape: tuple[int, int, int] = SHAPE) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """(latents, timesteps, conditioning) of two clips."""
    family, draw = family_of(type(model).__name__), torch.Generator().manual_seed(0)
    x = torch.randn(2, family.channels(model.config), *shape, generator=draw)
    return x, torch.tensor([700.0, 300.0]), family.example_conditioning(model.config, 2, shape, 8, draw)


def paths(model: Any) -> tuple[str, ...]:
    return clip_blocks(family_of(type(model).__name__), graph_of(model))


def frames_of(mode: FrameLocal, text: int, *, first: bool) -> torch.Tensor:
    """The frame of every token [tokens]; -1 of the text's."""
    clip, words = torch.arange(mode.frames).repeat_interleave(mode.per_frame), torch.full((text,), -1)
    return torch.cat([words, clip] if first else [clip, words])


@pytest.mark.parametrize("mask", [None, "of keys", "of pairs", "added"])
def test_it_is_the_masked_softmax(model: Any, mask: str | None) -> None:
    """Own frame and text are open, to the text's tokens everything is; a mask that is there already holds too."""
    first = family_of(type(model).__name__).text_first
    mode, text = FrameLocal(model, SHAPE), 0 if "Wan" in type(model).__name__ else TEXT
    frame = frames_of(mode, text, first=first)
    n, tokens, draw = 2, len(frame), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(n, 2, tokens, 4, generator=draw, dtype=torch.float64) for _ in range(3))
    shown = torch.rand(n, 1, tokens if mask == "of pairs" else 1, tokens, generator=draw) > 0.3
    shown[..., :: mode.per_frame] = True  # something of every frame
    added = torch.randn(n, 1, tokens, tokens, generator=draw, dtype=torch.float64)
    given = {None: None, "added": added}.get(mask, shown)
    scores = query @ key.transpose(2, 3) * 0.3
    if given is not None:
        scores = scores + given if mask == "added" else scores.masked_fill(~given, -torch.inf)
    open_ = (frame[:, None] == frame) | (frame == -1) | (frame[:, None] == -1)
    expected = scores.masked_fill(~open_, -torch.inf).softmax(dim=3) @ value
    torch.testing.assert_close(mode.attend(query, key, value, attn_mask=given, scale=0.3), expected)
    assert not torch.allclose(F.scaled_dot_product_attention(query, key, value, attn_mask=given, scale=0.3), expected)


def test_arguments_of_attention_may_be_given_by_place(model: Any) -> None:
    mode, draw = FrameLocal(model, SHAPE), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, mode.frames * mode.per_frame, 4, generator=draw) for _ in range(3))
    with mode:
        by_place = F.scaled_dot_product_attention(query, key, value, None, 0.0, False)
    assert torch.equal(by_place, mode.attend(query, key, value))


def test_no_attention_is_left_on_other_frames(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read off values that say which frame a token is of; without it they give the score that chooses blocks."""
    mode = FrameLocal(model, SHAPE)
    frame = frames_of(mode, 0, first=False)
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, len(frame), 4, generator=draw) for _ in range(2))
    value = F.one_hot(frame, mode.frames).float().expand(1, 2, -1, -1)

    def mass(shares: torch.Tensor) -> float:
        return float((shares * (1.0 - value)).sum(dim=3).mean())

    assert mass(mode.attend(query, key, value)) == 0.0
    monkeypatch.setattr(temporal_attention, "QUERIES", len(frame))
    expected = float(mass_on_other_frames(query, key, mode.frames))
    assert mass(F.scaled_dot_product_attention(query, key, value)) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.3


def test_one_latent_frame_is_unchanged_bit_for_bit(model: Any) -> None:
    given = inputs(model, (1, 8, 8))
    assert torch.equal(frame_local_network(model, paths(model))(*given), as_network(model)(*given))


def test_a_frame_changes_no_other_frame(model: Any) -> None:
    """Of the first block's attention, whose inputs know nothing of other frames yet; nor of any block, without text."""
    family = family_of(type(model).__name__)
    mode, seen = FrameLocal(model, SHAPE), list[torch.Tensor]()
    x, timestep, conditioning = inputs(model)
    changed = x.clone()
    changed[:, :, 1] += 1.0

    def see(module: Any, args: Any, output: Any) -> None:  # of a joint attention (clip, text)
        seen.append(output[0] if isinstance(output, tuple) else output)

    model.get_submodule(f"{paths(model)[0]}.{family.self_attention}").register_forward_hook(see)
    local, whole = frame_local_network(model, paths(model)), as_network(model)
    ends = [network(clip, timestep, conditioning) for network in (local, whole) for clip in (x, changed)]
    tokens = [(a != b).any(dim=2).view(2, mode.frames, mode.per_frame) for a, b in (seen[:2], seen[2:])]
    assert [apart.any(dim=(0, 2)).tolist() for apart in tokens] == [[False, True, False], [True, True, True]]
    of_frames = [(a != b).any(dim=(0, 1, 3, 4)).tolist() for a, b in (ends[:2], ends[2:])]
    text = "Wan" not in type(model).__name__  # joined with the clip, it carries what one block saw to the next
    assert of_frames == [[text, True, text], [True, True, True]]


def test_other_blocks_attend_to_all_frames(model: Any) -> None:
    given = inputs(model)
    some, whole = frame_local_network(model, paths(model)[:1])(*given), as_network(model)(*given)
    every = frame_local_network(model, paths(model))(*given)
    assert not torch.equal(some, whole)
    assert not torch.equal(some, every)
    assert torch.equal(as_network(model)(*given), whole)  # nothing stays behind
    assert torch.equal(frame_local_network(model, ())(*given), whole)


def test_its_blocks_are_those_that_the_choice_by_temporal_attention_takes() -> None:
    plain = graph_of(models.hunyuan_video()[0])
    message = r"^--frame-local: 0\.3 given, but RUN has not measured which blocks attend least to other frames; put "
    with pytest.raises(RequestError, match=message):
        frame_local_blocks(plain, 0.3, "RUN")
    clip = clip_blocks(family_of(plain.model_class), plain)
    graph = plain.with_temporal_attention(
        {path: Estimate(mean=1.0 / (1.0 + number), standard_error=0.01) for number, path in enumerate(clip)}
    )
    assert frame_local_blocks(graph, 0.25, "RUN") == choose(graph, 0.25, "temporal-attention") == clip[-3:]
    for share in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(RequestError, match=r"^--frame-local: .* given, expected a share of the parameters between"):
            frame_local_blocks(graph, share, "RUN")
    with pytest.raises(RequestError, match=r"^--frame-local: 0\.99 given, but the measured blocks of RUN do not hold"):
        frame_local_blocks(graph, 0.99, "RUN")
