"""Every family's conversions by hand: layouts, timesteps, signs, first frames, shifts. No network runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flcompress.models.families import family_of, known_families
from flcompress.models.families.cogvideox import positions
from flcompress.models.families.conversions import (
    even_sigmas,
    pack,
    pad_tokens,
    picture_of,
    unpack,
    velocity_to,
    with_first,
)
from flcompress.models.families.shared import GUIDANCE

pytestmark = pytest.mark.e2e

T = torch.tensor([250.0, 1000.0])
TEXT = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)


def numbered(*shape: int) -> torch.Tensor:
    """Latents of which no two numbers are alike."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_packing_lays_out_patches_row_by_row_channel_first() -> None:
    """Token (i, j) holds, for each channel, the patch's 2 x 2 numbers row by row; unpacking undoes it exactly."""
    x = numbered(2, 3, 1, 4, 6)
    tokens = pack(x)
    assert tokens.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            expected = x[:, :, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(2, 12)
            assert torch.equal(tokens[:, 3 * row + column], expected)
    assert torch.equal(unpack(tokens, x), x)


def test_padding_adds_zeros_after_the_last_token() -> None:
    made = pad_tokens(TEXT, 5)
    assert made.shape == (2, 5, 4)
    assert torch.equal(made[:, :3], TEXT)
    assert not made[:, 3:].any()
    assert pad_tokens(TEXT, 3) is TEXT
    assert pad_tokens(TEXT, 2) is TEXT
    assert pad_tokens(torch.ones(2, 3, dtype=torch.long), 4).tolist() == [[1, 1, 1, 0]] * 2


def test_a_given_first_frame_stays_and_its_velocity_leads_to_it() -> None:
    """Tweedie's x - s v of the held frames is the given frame, at every level; the other frames are untouched."""
    x, first, output = numbered(2, 3, 4, 2, 2), -numbered(2, 3, 1, 2, 2), 0.5 * numbered(2, 3, 4, 2, 2)
    held = with_first(x, first.double())
    assert held.dtype == x.dtype
    assert torch.equal(held[:, :, :1], first)
    assert torch.equal(held[:, :, 1:], x[:, :, 1:])
    found = velocity_to(first, output, x, T)
    assert torch.equal(found[:, :, 1:], output[:, :, 1:])
    level = (T / 1000.0).reshape(2, 1, 1, 1, 1)
    torch.testing.assert_close((x - level * found)[:, :, :1], first)
    assert bool(velocity_to(first, output, x, torch.zeros(2)).isfinite().all())


def test_the_first_frame_as_a_picture() -> None:
    clip = torch.full((3, 2, 2, 3), 5.0)
    clip[:, 0] = torch.tensor([-1.0, 0.0, 2.0]).reshape(3, 1, 1)
    picture = picture_of(clip)
    assert picture.size == (3, 2)
    assert picture.getpixel((2, 1)) == (0, 128, 255)


def test_even_sigmas() -> None:
    assert even_sigmas(4) == [1.0, 0.75, 0.5, 0.25]
    assert even_sigmas(1) == [1.0]


def test_wan() -> None:
    family, config = family_of("WanTransformer3DModel"), {"patch_size": (1, 2, 2), "out_channels": 3, "in_channels": 5}
    x = numbered(2, 3, 3, 4, 6)
    given: dict[str, Any] = {"encoder_hidden_states": TEXT}
    made = family.arguments(config, x, T, given, None)
    assert made == {"hidden_states": x, "timestep": T, "encoder_hidden_states": TEXT}
    assert family.prediction(config, x, x, T, given) is x
    condition, picture = -numbered(2, 2, 3, 4, 6), numbered(2, 4, 8)
    beside = family.arguments(
        config, x, T, {**given, "condition": condition.double(), "encoder_hidden_states_image": picture}, None
    )
    assert torch.equal(beside["hidden_states"], torch.cat([x, condition], dim=1))
    assert beside["hidden_states"].dtype == x.dtype
    assert beside["encoder_hidden_states_image"] is picture
    assert torch.equal(beside["timestep"], T)
    # TI2V-5B: clean first tokens at timestep 0, 2 x 3 tokens a frame.
    first = -numbered(2, 3, 1, 4, 6)
    held = family.arguments(config, x, T, {**given, "first_frame": first}, None)
    assert torch.equal(held["hidden_states"], torch.cat([first, x[:, :, 1:]], dim=2))
    assert held["timestep"].shape == (2, 18)
    assert not held["timestep"][:, :6].any()
    assert torch.equal(held["timestep"][:, 6:], T[:, None].expand(2, 12))
    found = family.prediction(config, x, x, T, {"first_frame": first})
    assert torch.equal(found, velocity_to(first, x, x, T))
    assert family.channels(config) == 3
    assert family.patch(config) == (1, 2)
    assert family.sigmas(4, {}) is None
    assert family.start(x, given) is x
    assert family.cut_frames(config) == 0
    assert family.fixed_latents(config) is None


HUNYUAN_CONFIG: dict[str, Any] = {"guidance_embeds": True, "in_channels": 16}


@pytest.fixture
def hunyuan_given() -> dict[str, torch.Tensor]:
    return {
        "encoder_hidden_states": TEXT,
        "encoder_attention_mask": torch.ones(2, 3),
        "pooled_projections": torch.ones(2, 5),
    }


def test_hunyuan_video(hunyuan_given: dict[str, torch.Tensor]) -> None:
    family, x = family_of("HunyuanVideoTransformer3DModel"), numbered(2, 3, 3, 2, 2)
    made = family.arguments(HUNYUAN_CONFIG, x, T, hunyuan_given, None)
    assert made["hidden_states"] is x
    assert made["timestep"] is T
    assert {name: made[name] for name in hunyuan_given} == hunyuan_given
    assert made["guidance"].tolist() == [6000.0, 6000.0]
    assert family.arguments(HUNYUAN_CONFIG, x, T, hunyuan_given, 1.5)["guidance"].tolist() == [1500.0, 1500.0]
    each = {**hunyuan_given, GUIDANCE: torch.tensor([2.0, 7.5])}
    assert family.arguments(HUNYUAN_CONFIG, x, T, each, 1.5)["guidance"].tolist() == [2000.0, 7500.0]
    assert "guidance" not in family.arguments({**HUNYUAN_CONFIG, "guidance_embeds": False}, x, T, hunyuan_given, 1.5)
    assert family.prediction(HUNYUAN_CONFIG, x, x, T, hunyuan_given) is x
    assert family.start(x, hunyuan_given) is x
    assert family.cut_frames(HUNYUAN_CONFIG) == 0
    assert family.channels(HUNYUAN_CONFIG) == 16
    assert family.sigmas(2, {}) == [1.0, 0.5]
    assert family.call(4.0, 7.0) == {"guidance_scale": 7.0, "true_cfg_scale": 4.0, "negative_prompt": ""}
    assert family.call(4.0, None) == {"true_cfg_scale": 4.0, "negative_prompt": ""}


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_hunyuan_video_from_an_image(hunyuan_given: dict[str, torch.Tensor], kind: str) -> None:
    family, x = family_of("HunyuanVideoTransformer3DModel"), numbered(2, 3, 3, 2, 2)
    config = {**HUNYUAN_CONFIG, "image_condition_type": kind, "in_channels": 33}
    first = -numbered(2, 3, 1, 2, 2)
    given = {**hunyuan_given, "first_frame": first}
    made = family.arguments(config, x, T, given, None)["hidden_states"]
    if kind == "latent_concat":
        assert torch.equal(made[:, :3], x)
        assert torch.equal(made[:, 3:6, :1], first)
        assert not made[:, 3:6, 1:].any()
        assert made.shape[1] == 7
        assert bool((made[:, 6, 0] == 1.0).all())
        assert not made[:, 6, 1:].any()
        assert family.prediction(config, x, x, T, given) is x
    else:
        assert torch.equal(made, with_first(x, first))
        assert torch.equal(family.prediction(config, x, x, T, given), velocity_to(first, x, x, T))
    assert family.cut_frames(config) == (4 if kind == "latent_concat" else 0)
    assert family.channels(config) == (16 if kind == "latent_concat" else 33)
    # Sampling starts from a trace of the first frame, in every frame.
    torch.testing.assert_close(family.start(x, given), 0.999 * x + 0.001 * first.expand_as(x))


def test_cogvideox() -> None:
    """Frames before channels, in and out; a first frame's latents beside the noised ones."""
    family, x = family_of("CogVideoXTransformer3DModel"), numbered(2, 3, 4, 2, 6)
    config = {"use_rotary_positional_embeddings": False, "ofs_embed_dim": None, "out_channels": 3, "patch_size": 2}
    made = family.arguments(config, x, T, {"encoder_hidden_states": TEXT}, None)
    assert made.keys() == {"hidden_states", "timestep", "encoder_hidden_states"}
    assert torch.equal(made["hidden_states"], x.permute(0, 2, 1, 3, 4))
    assert made["timestep"] is T
    assert torch.equal(family.prediction(config, x.permute(0, 2, 1, 3, 4), x, T, {}), x)
    beside = -numbered(2, 2, 4, 2, 6)
    both = family.arguments(
        {**config, "ofs_embed_dim": 8}, x, T, {"encoder_hidden_states": TEXT, "image_latents": beside}, None
    )
    assert torch.equal(both["hidden_states"], torch.cat([x, beside], dim=1).transpose(1, 2))
    assert both["ofs"].tolist() == [2.0]
    assert family.channels(config) == 3
    assert family.patch(config) == (1, 2)
    assert family.patch({**config, "patch_size_t": 2}) == (2, 2)
    noise = family.noise((3, 4, 2, 6), torch.Generator().manual_seed(0))
    assert torch.equal(noise.transpose(1, 2), torch.randn(1, 4, 3, 2, 6, generator=torch.Generator().manual_seed(0)))
    learned = {"sample_frames": 49, "temporal_compression_ratio": 4, "sample_height": 60, "sample_width": 90}
    assert family.fixed_latents({**learned, "use_learned_positional_embeddings": True}) == (13, 60, 90)
    assert family.fixed_latents({**learned, "use_learned_positional_embeddings": False}) is None


@pytest.mark.parametrize(("over_time", "tokens"), [(None, 4 * 2 * 3), (2, 2 * 2 * 3)])
def test_the_rotary_table_of_cogvideox(over_time: int | None, tokens: int) -> None:
    """A row for each token, in the order of frames, rows and columns; the first token's angles are zero."""
    family, x = family_of("CogVideoXTransformer3DModel"), numbered(1, 3, 4, 4, 6)
    config = {
        "use_rotary_positional_embeddings": True,
        "ofs_embed_dim": None,
        "patch_size": 2,
        "patch_size_t": over_time,
        "sample_height": 4,
        "sample_width": 6,
        "attention_head_dim": 32,
    }
    cos, sin = family.arguments(config, x, T[:1], {"encoder_hidden_states": TEXT}, None)["image_rotary_emb"]
    assert cos.shape == sin.shape == (tokens, 32)
    assert bool((cos[0] == 1.0).all())
    assert not sin[0].any()
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))
    # A step of one token, row or frame is the unit angle of its axis: of 32 channels 8 are time's and 12 each space's.
    columns, rows = 3, 2
    for step, channel in ((1, 20), (columns, 8), (columns * rows, 0)):
        assert float(sin[step, channel]) == pytest.approx(torch.sin(torch.tensor(1.0)).item(), rel=1e-5)
    odd = family.arguments(
        {**config, "patch_size_t": 2}, numbered(1, 3, 5, 4, 6), T[:1], {"encoder_hidden_states": TEXT}, None
    )
    assert len(odd["image_rotary_emb"][0]) == 3 * 2 * 3


def test_ltx() -> None:
    family, x = family_of("LTXVideoTransformer3DModel"), numbered(2, 3, 2, 4, 6)
    scale = family._scale(8, 32)  # type: ignore[attr-defined]
    assert scale.tolist() == [[pytest.approx(8 / 25), 32.0, 32.0]]
    given = {
        "encoder_hidden_states": TEXT, "encoder_attention_mask": torch.ones(2, 3),
        "rope_interpolation_scale": scale.expand(2, 3),
    }  # fmt: skip
    made = family.arguments({}, x, T, given, None)
    assert torch.equal(made["hidden_states"], x.reshape(2, 3, 48).permute(0, 2, 1))
    assert (made["num_frames"], made["height"], made["width"]) == (2, 4, 6)
    assert made["rope_interpolation_scale"] == pytest.approx((0.32, 32.0, 32.0))
    assert made["timestep"] is T
    assert torch.equal(family.prediction({}, made["hidden_states"], x, T, given), x)
    assert family.sequence_length({}, (2, 4, 6)) == 48
    assert family.sigmas(2, {}) == [1.0, 0.5]


def test_mochi_counts_from_noise_to_data() -> None:
    """At the network's own time 1 - s it predicts x0 - e: minus our velocity."""
    family, x = family_of("MochiTransformer3DModel"), numbered(2, 3, 2, 4, 6)
    given = {"encoder_hidden_states": TEXT, "encoder_attention_mask": torch.tensor([[1.0, 1.0, 0.0]] * 2)}
    made = family.arguments({}, x, T, given, None)
    assert made["timestep"].tolist() == [750.0, 0.0]
    assert made["hidden_states"] is x
    assert made["encoder_attention_mask"].tolist() == [[True, True, False]] * 2
    assert torch.equal(family.prediction({}, x, x, T, given), -x)
    sigmas = family.sigmas(8, {})
    assert sigmas is not None
    assert len(sigmas) == 8
    assert (sigmas[0], sigmas[1]) == pytest.approx((1.0, 1.0 - 0.025 / 4))


def test_flux() -> None:
    family, x = family_of("FluxTransformer2DModel"), numbered(2, 3, 1, 4, 6)
    given = {"encoder_hidden_states": TEXT, "pooled_projections": torch.ones(2, 5)}
    made = family.arguments({"guidance_embeds": True}, x, T, given, None)
    assert torch.equal(made["hidden_states"], pack(x))
    assert made["timestep"].tolist() == [0.25, 1.0]
    assert made["guidance"].tolist() == [3.5, 3.5]
    assert family.arguments({"guidance_embeds": True}, x, T, given, 2.0)["guidance"].tolist() == [2.0, 2.0]
    each = {**given, GUIDANCE: torch.tensor([2.0, 7.5])}
    assert family.arguments({"guidance_embeds": True}, x, T, each, 1.5)["guidance"].tolist() == [2.0, 7.5]
    assert "guidance" not in family.arguments({"guidance_embeds": False}, x, T, given, 2.0)
    assert made["img_ids"].tolist() == [[0.0, row, column] for row in range(2) for column in range(3)]
    assert made["txt_ids"].tolist() == [[0.0, 0.0, 0.0]] * 3
    assert torch.equal(family.prediction({}, pack(x), x, T, given), x)
    assert family.channels({"in_channels": 64}) == 16
    assert family.patch({}) == (1, 2)
    assert family.sequence_length({}, (1, 4, 6)) == 6
    assert family.sigmas(2, {}) == [1.0, 0.5]
    assert family.call(2.0, 3.5) == {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": ""}
    assert family.call(2.0, None) == {"true_cfg_scale": 2.0, "negative_prompt": ""}


def test_stable_diffusion_3() -> None:
    family, x = family_of("SD3Transformer2DModel"), numbered(2, 3, 1, 4, 6)
    given = {"encoder_hidden_states": TEXT, "pooled_projections": torch.ones(2, 5)}
    made = family.arguments({}, x, T, given, None)
    assert torch.equal(made["hidden_states"], x[:, :, 0])
    assert made["timestep"] is T
    assert torch.equal(family.prediction({}, x[:, :, 0], x, T, given), x)
    assert family.sequence_length({"patch_size": 2}, (1, 4, 6)) == 6
    assert family.call(2.0, None) == {"guidance_scale": 2.0}
    assert family.patch({"patch_size": 2}) == (1, 2)
    assert family.patch({}) == (1, 1)


def test_qwen_image() -> None:
    family, x = family_of("QwenImageTransformer2DModel"), numbered(2, 3, 1, 4, 6)
    given = {"encoder_hidden_states": TEXT, "encoder_hidden_states_mask": torch.ones(2, 3, dtype=torch.long)}
    made = family.arguments({}, x, T, given, None)
    assert torch.equal(made["hidden_states"], pack(x))
    assert made["timestep"].tolist() == [0.25, 1.0]
    assert made["img_shapes"] == [[(1, 2, 3)], [(1, 2, 3)]]
    assert torch.equal(family.prediction({}, pack(x), x, T, given), x)


def test_dynamic_shifting_is_linear_in_the_tokens() -> None:
    """At the base length the base shift, at the longest the largest; absent where it is not asked for."""
    family = family_of("FluxTransformer2DModel")
    scheduler = {"use_dynamic_shifting": True}
    assert family.mu(scheduler, {}, (1, 32, 32)) == pytest.approx(0.5)  # 256 tokens
    assert family.mu(scheduler, {}, (1, 128, 128)) == pytest.approx(1.15)  # 4096 tokens
    own = {**scheduler, "base_image_seq_len": 4, "max_image_seq_len": 8, "base_shift": 1.0, "max_shift": 3.0}
    assert family.mu(own, {}, (1, 4, 6)) == pytest.approx(2.0)
    assert family.mu({}, {}, (1, 32, 32)) is None


@pytest.mark.parametrize("family", known_families(), ids=lambda family: family.name)
def test_noise_is_drawn_in_the_order_of_the_stock_pipeline(family: Any) -> None:
    noise = family.noise((2, 1, 4, 4), torch.Generator().manual_seed(1))
    assert noise.shape == (1, 2, 1, 4, 4)
    expected = torch.randn(1, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise, expected)  # one frame: frames and channels in whatever order
    assert all(family_of(name) is family for name in (*family.pipelines, *family.transformers))


@pytest.mark.parametrize("size", [(9, 4, 6), (13, 6, 4)])
def test_the_sine_positions_of_an_exported_cogvideox_are_stocks(size: tuple[int, int, int]) -> None:
    """At the size of the stock module's table and at another; scales that differ over space and time."""
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    frames, height, width = size
    stock = CogVideoXPatchEmbed(
        embed_dim=64,
        sample_height=4,
        sample_width=6,
        sample_frames=9,
        max_text_seq_length=5,
        spatial_interpolation_scale=1.875,
        temporal_interpolation_scale=1.25,
    )
    expected = stock._get_positional_embeddings(height, width, frames)
    assert expected.shape == (1, 5 + ((frames - 1) // 4 + 1) * (height // 2) * (width // 2), 64)
    torch.testing.assert_close(positions(stock, height, width, frames).double(), expected, rtol=0.0, atol=2e-6)
