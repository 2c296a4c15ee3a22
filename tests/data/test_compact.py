"""Conditioning on disk: nothing that is read differs from what was encoded, and no padding is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from flcompress.data.compact import HALVES, compact, rows_of, stored_row
from flcompress.data.dataset import LatentDataset
from flcompress.data.index import ClipRecord, ClipShard, Index, PromptShard, write_shard
from flcompress.models.families import family_of

WAN, HUNYUAN, COGVIDEOX = (family_of(f"{name}Pipeline") for name in ("Wan", "HunyuanVideo", "CogVideoX"))


def prompts(lengths: list[int], tokens: int = 12, width: int = 3) -> torch.Tensor:
    """Embeddings [n, tokens, width] with zeros behind the length of each."""
    embeds = torch.randn(len(lengths), tokens, width, generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        embeds[row, length:] = 0.0
    return embeds


def read_again(folder: Path, stored: dict[str, torch.Tensor], name: str, rows: int) -> torch.Tensor:
    write_shard(folder / "shard.safetensors", stored)
    with safe_open(str(folder / "shard.safetensors"), framework="pt") as file:
        compacted = rows_of(name) in file.keys()  # noqa: SIM118 (no mapping)
        return torch.cat([stored_row(file, name, row, compacted=compacted) for row in range(rows)])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from([None, *HALVES]), st.booleans())
def test_what_is_read_is_what_was_encoded(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], dtype: torch.dtype | None, minus: bool
) -> None:
    """Bit for bit, the sign of a zero too; in the half precision that it was computed in, at the length of each."""
    embeds = prompts(lengths)
    if dtype is not None:
        embeds = embeds.to(dtype).float()
    if minus:
        embeds[0, -1] = -0.0
    stored = compact(WAN, {"embeds": embeds})
    used = sum(lengths) if not minus else sum(lengths[1:]) + 12
    if used < 12 * len(lengths):
        assert len(stored["embeds"]) == used
    if dtype is not None and sum(lengths) > 1:
        assert stored["embeds"].dtype == dtype
    own = read_again(tmp_path_factory.mktemp("shard"), stored, "embeds", len(lengths))
    assert torch.equal(own.view(torch.int32), embeds.view(torch.int32))


def test_one_number_that_needs_fp32_keeps_all_in_it() -> None:
    embeds = prompts([12, 12]).bfloat16().float()
    embeds[1, 3, 2] = 1.0 + 2.0**-20
    assert compact(WAN, {"embeds": embeds})["embeds"].dtype == torch.float32
    embeds[1, 3, 2] = float("nan")
    assert compact(WAN, {"embeds": embeds})["embeds"].dtype == torch.float32


def test_what_a_mask_hides_is_not_stored() -> None:
    """Of HunyuanVideo up to the last token that is shown; CogVideoX has no mask and sees its padding."""
    embeds = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 0, 0]]).float()
    given = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    stored = compact(HUNYUAN, given)
    assert torch.equal(stored["encoder_hidden_states"], torch.cat([embeds[0, :3], embeds[1, :5]]))
    assert compact(COGVIDEOX, {"encoder_hidden_states": embeds})["encoder_hidden_states"].shape == embeds.shape


@pytest.mark.parametrize("compacted", [False, True])
def test_both_versions_are_read_alike(tmp_path: Path, compacted: bool) -> None:
    """Prompts and the clips' own conditioning, from shards of either layout, at the same draws."""
    embeds = prompts([2, 5, 12, 3])
    mask, own = torch.ones(4, 1).long(), prompts([1, 12, 4])

    def laid_out(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return compact(WAN, tensors) if compacted else tensors

    shards = []
    for number, rows in enumerate((slice(0, 3), slice(3, 4))):
        file = f"prompts-{number}.safetensors"
        tensors = {"encoder_hidden_states": embeds[rows], "mask": mask[rows]}
        digest, size = write_shard(tmp_path / file, laid_out(tensors))
        shards.append(PromptShard(file=file, sha256=digest, bytes=size, prompts=rows.stop - rows.start))
    frames = {"conditioning." + name: value for name, value in laid_out({"first": own}).items()}
    digest, size = write_shard(tmp_path / "clips", {"latents": torch.arange(3.0)[:, None, None, None, None], **frames})
    records = tuple(ClipRecord(file=str(n), prompt=n + 1) for n in range(3))
    clips = ClipShard(file="clips", sha256=digest, bytes=size, size=(1, 8, 8), clips=records)
    Index(
        version=2 if compacted else 1, prompts=("", "a", "b", "c"), prompt_shards=tuple(shards), clip_shards=(clips,)
    ).write(tmp_path)
    latents, given = LatentDataset.load(tmp_path).batch(8, torch.Generator().manual_seed(1))
    drawn = latents.flatten().long()
    assert set(given) == {"encoder_hidden_states", "mask", "first"}
    assert torch.equal(given["encoder_hidden_states"], embeds[drawn + 1])
    assert torch.equal(given["mask"], mask[drawn + 1])
    assert torch.equal(given["first"], own[drawn])
    assert torch.equal(LatentDataset.load(tmp_path).empty["encoder_hidden_states"], embeds[:1])
