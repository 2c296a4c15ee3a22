"""Clips of an evaluation: names, files, held-out prompts, and a run whose data are clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flcompress
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError, RequestError
from flcompress.evaluation.clips.prompts import held_out_clips
from flcompress.frontend.loading import load_recipe
from flcompress.models.parts import open_parts
from flcompress.moving_digits.dataset import build_moving_digits
from flcompress.progress import QuietDisplay
from flcompress.runtime.clip_files import pixels_of
from flcompress.runtime.clip_folder import ClipFolder, Item, clip_name, read_frames, write_frames
from flcompress.stats import bootstrap
from tests.evaluation.conftest import make_run


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=400), st.text(max_size=400))
def test_names_are_safe_and_unique(prompt: str, other: str) -> None:
    first, second = (clip_name(text, Item(prompt=_utf8(text)).key, 0, 0) for text in (prompt, other))
    assert first.isascii()
    assert not set(first) & set("/\\\"' \n\0")
    assert len(first) < 100
    assert (first == second) == (_utf8(prompt) == _utf8(other))


def _utf8(text: str) -> str:
    """A prompt that is Unicode text, which `check_prompt` asks for."""
    return text.encode("utf-8", "replace").decode("utf-8")


def test_a_clip_is_read_as_it_was_written(tmp_path: Path) -> None:
    clip = torch.linspace(-0.8, 0.8, 48)[None, None, None, :].expand(3, 5, 33, 48)
    write_frames(pixels_of(clip), tmp_path / "clip.mp4", 7.0)
    frames = read_frames(tmp_path / "clip.mp4")
    assert frames.shape == (5, 32, 48, 3), "an odd side loses a line"
    wanted = ((clip.permute(1, 2, 3, 0)[:, :32] + 1.0) * 127.5).numpy()
    assert np.abs(frames - wanted).mean() < 3.0


def test_a_broken_clip_is_named(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(FlcompressError, match=r"clip\.mp4: cannot be decoded .*delete it and give the same command"):
        read_frames(tmp_path / "clip.mp4")


def test_processes_write_manifests_of_their_own(tmp_path: Path) -> None:
    facts = {"item": "x", "prompt": "p", "seed": 0, "number": 0}
    for rank in range(2):
        ClipFolder(tmp_path, rank).add(torch.zeros(3, 1, 32, 32), 8.0, file=f"{rank}.mp4", **facts)
    assert sorted(ClipFolder(tmp_path).intact(["0.mp4", "1.mp4", "2.mp4"])) == ["0.mp4", "1.mp4"]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["manifest-0.jsonl", "manifest-1.jsonl"]


@pytest.mark.parametrize(
    ("passes", "kept"),
    [
        ("[]", 25),
        ("[stochastic-depth: {remove: 0.3, steps: 1}]", 25),
        ("[stochastic-depth: {remove: 0.3, steps: 1}, dmd: {steps: 1}]", 8),
        ("[select: {remove: 0.3, recover: 5}, prune: {remove: 0.3, by: joint}]", 25),
    ],
)
def test_held_out_is_what_no_pass_trains_on(tmp_path: Path, passes: str, kept: int) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"version: 1\nmodel: {{path: m}}\ndata: {{latents: d}}\npasses: [importance: {{}}, {passes[1:]}\n"
        if passes != "[]"
        else "version: 1\nmodel: {path: m}\ndata: {latents: d}\npasses: []\n"
    )
    assert held_out_clips(load_recipe(path), 100) == kept


def test_the_bootstrap_covers_nothing_for_equal_models() -> None:
    """Two identical models give an interval around 0 that covers 0 in about 95 % of draws."""
    draw = np.random.default_rng(0)
    covered = [bootstrap(list(draw.normal(size=40))).holds(0.0) for _ in range(300)]
    assert 0.9 <= np.mean(covered) <= 0.98
    assert bootstrap([3.0]).measured is False
    with pytest.raises(RequestError, match="bootstrap: no values given"):
        bootstrap([])


@pytest.fixture(scope="module")
def clips_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose data are 12 clips, of which the last 3 are held out."""
    folder = tmp_path_factory.mktemp("clips-run")
    (folder / "encoded").mkdir()
    request = {"max_sequence_length": 16}
    build_moving_digits(folder / "encoded", 12, open_parts(model), request, 0, lambda done, total, values: None)
    return make_run(folder, model, data="{latents: encoded}")


@pytest.mark.e2e
def test_held_out_clips_give_prompts_and_real_ones(clips_run: RunDirectory) -> None:
    results = flcompress.evaluate(clips_run, clips_per_prompt=1, seeds=2, display=QuietDisplay())
    assert results["benchmark"] == "proxies"
    assert results["reference_clips"] == 3
    assert 1 <= results["prompts"] <= 3
    assert results["source"] == "the last 3 of 12 clips, which no pass trained on"
    assert [row["name"] for row in results["contenders"]][-1] == "student"
    assert {"saturation", "flow", "relation"} <= set(results["floor"])
    assert "frechet_random" in results["contenders"][0]


@pytest.mark.e2e
def test_a_dataset_without_held_out_clips_says_what_to_pass(model: Path, tmp_path: Path) -> None:
    (tmp_path / "encoded").mkdir()
    request = {"max_sequence_length": 16}
    build_moving_digits(tmp_path / "encoded", 1, open_parts(model), request, 0, lambda done, total, values: None)
    run = make_run(tmp_path, model, data="{latents: encoded}", stages=False)
    with pytest.raises(RequestError, match=r"encoded: 1 clips, none of which .* holds out; give --prompts FILE"):
        flcompress.evaluate(run, display=QuietDisplay())
