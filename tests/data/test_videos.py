from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flcompress.data.build import build_dataset, check_dataset
from flcompress.data.latents import LatentDataset
from flcompress.diffusion.contract import contract_of
from flcompress.errors import DataError
from flcompress.models.parts import open_parts
from tests.tiny import tiny_pipeline

PROMPTS = {"encoder_hidden_states": torch.zeros(1, 4, 8)}
NEGATIVE = {"encoder_hidden_states": torch.zeros(1, 4, 8)}


def gif(path: Path, frames: int = 9, size: int = 32) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)


def spec(folder: Path) -> dict[str, dict[str, str]]:
    return {"videos": {"folder": str(folder), "captions": str(folder / "captions.jsonl")}}


def captions(folder: Path, *files: str) -> None:
    (folder / "captions.jsonl").write_text("".join(f'{{"file": "{file}", "caption": "a two"}}\n' for file in files))


def silent(done: int, total: int, values: object) -> None:
    pass


def test_videos_become_latents(tmp_path: Path) -> None:
    gif(tmp_path / "a.gif")
    gif(tmp_path / "b.gif")
    captions(tmp_path, "a.gif", "b.gif")
    check_dataset(spec(tmp_path))
    model = tiny_pipeline(tmp_path / "model", layers=1)
    contract = contract_of({}, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16)
    made = build_dataset(spec(tmp_path), open_parts(model), contract, 0, silent)
    assert made.latents.shape == (2, 16, 3, 8, 8)
    assert made.captions == ("a two",)
    made.save(tmp_path / "latents")
    assert torch.equal(LatentDataset.load(tmp_path / "latents").latents, made.latents)


def test_a_captions_file_without_lines_is_refused(tmp_path: Path) -> None:
    captions(tmp_path)
    with pytest.raises(DataError, match=r"captions\.jsonl: no clips; expected at least one line"):
        check_dataset(spec(tmp_path))


def test_mixed_sizes_are_refused_by_name(tmp_path: Path) -> None:
    gif(tmp_path / "a.gif")
    gif(tmp_path / "b.gif", size=48)
    captions(tmp_path, "a.gif", "b.gif")
    with pytest.raises(DataError, match=r"b\.gif: 9 x 48 x 48 \(frames, height, width\) given, expected 9 x 32 x 32"):
        check_dataset(spec(tmp_path))


def test_a_missing_video_and_a_bad_line_are_named(tmp_path: Path) -> None:
    captions(tmp_path, "gone.gif")
    with pytest.raises(DataError, match=r"captions\.jsonl:1: .*gone\.gif: no such video"):
        check_dataset(spec(tmp_path))
    (tmp_path / "captions.jsonl").write_text("not json\n")
    with pytest.raises(DataError, match=r"captions\.jsonl:1: 'not json' given, expected"):
        check_dataset(spec(tmp_path))


def test_an_empty_or_damaged_latent_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a latent dataset"):
        check_dataset({"latents": str(tmp_path)})
    empty = LatentDataset(torch.zeros(0, 4, 1, 2, 2), torch.zeros(0, dtype=torch.long), PROMPTS,
                          NEGATIVE, ("",))  # fmt: skip
    empty.save(tmp_path / "empty")
    with pytest.raises(DataError, match="no clips; expected at least one"):
        check_dataset({"latents": str(tmp_path / "empty")})
    broken = LatentDataset(torch.full((1, 4, 1, 2, 2), torch.nan), torch.zeros(1, dtype=torch.long),
                           PROMPTS, NEGATIVE, ("",))  # fmt: skip
    broken.save(tmp_path / "broken")
    with pytest.raises(DataError, match="latents hold values that are not finite"):
        check_dataset({"latents": str(tmp_path / "broken")})
