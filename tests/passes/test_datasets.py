"""Recipes on encoded datasets: clips of two sizes, prompts alone, and videos encoded on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from flcompress.data.encoding import encode, folder_request
from flcompress.data.sizes import Target
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import DataError
from flcompress.models.loading import load_transformer
from flcompress.planning.plan import plan_recipe
from flcompress.progress import QuietDisplay
from tests.fixtures.tiny import tiny_pipeline
from tests.fixtures.video_files import write_video

pytestmark = pytest.mark.e2e

IMPORTANCE: dict[str, Any] = {"importance": {"draws": 8, "noise_levels": 2, "batch": 4}}
DMD: dict[str, Any] = {"dmd": {"steps": 1, "batch": 2, "critic_updates": 1, "intra_cfg": [0, 0], "student_steps": 2}}
SIZE = {"num_frames": 5, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, videos of two sizes, and both kinds of datasets."""
    folder = tmp_path_factory.mktemp("datasets")
    tiny_pipeline(folder / "model", layers=2)
    rows = []
    for number in range(6):
        file = f"{number}.mp4"
        write_video(folder / "videos" / file, width=32 if number % 2 else 40, frames=5, seed=number)
        rows.append(json.dumps({"file": file, "caption": f"a {number % 3}"}))
    (folder / "captions.jsonl").write_text("\n".join(rows))
    (folder / "prompts.txt").write_text("a one\na two\na three\n")
    for name, captions, videos in (("clips", "captions.jsonl", folder / "videos"), ("prompts", "prompts.txt", None)):
        request = folder_request(folder / "model", folder / captions, folder / name, videos, Target(), 16)
        encode(request, QuietDisplay())
    return folder


def recipe(folder: Path, name: str, data: dict[str, Any], passes: list[dict[str, Any]], **sampling: Any) -> Path:
    content = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 4, "guidance_scale": 3.0, "max_sequence_length": 16, **sampling},
        "data": data,
        "passes": passes,
        "training": {"health": {"on_breach": "warn", "samples": 3}, "log_to": []},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def student_is_new_and_finite(run: RunDirectory) -> None:
    program = run.final()
    student = load_transformer(program.components["transformer"]).state_dict()
    original = load_transformer(program.components["original"]).state_dict()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in student.values())
    assert any(not torch.equal(student[name], original[name]) for name in student)


def test_clips_of_two_sizes(folder: Path) -> None:
    run = apply(
        recipe(folder, "clips", {"latents": "clips"}, [IMPORTANCE, DMD]), folder / "run", display=QuietDisplay()
    )
    scored = run.entries()[0].program().graph
    assert all(block.importance is not None for block in scored.blocks)
    student_is_new_and_finite(run)
    assert not (run.path / "data").exists()  # the dataset is read where it lies
    for shard in (folder / "clips").iterdir():
        shard.touch()  # what it holds decides, not when it was copied there
    again = apply(folder / "clips.yaml", folder / "run", display=QuietDisplay())
    assert again.journal()[-1].status == "cached"


def test_prompts_alone_suffice_for_distillation(folder: Path) -> None:
    path = recipe(folder, "prompts", {"latents": "prompts"}, [DMD], **SIZE)
    student_is_new_and_finite(apply(path, folder / "run-prompts", display=QuietDisplay()))


def test_videos_of_a_recipe_go_the_same_way(folder: Path) -> None:
    data = {"videos": {"folder": "videos", "captions": "captions.jsonl"}}
    run = apply(recipe(folder, "videos", data, [IMPORTANCE]), folder / "run-videos", display=QuietDisplay())
    (made,) = (run.path / "data").iterdir()
    assert sorted(path.name for path in made.iterdir()) == sorted(path.name for path in (folder / "clips").iterdir())
    assert (made / "index.json").read_bytes() == (folder / "clips" / "index.json").read_bytes()


WITH_GAN: dict[str, Any] = {"dmd": {**DMD["dmd"], "gan_weight": 0.1}}


@pytest.mark.parametrize(
    ("step", "name"),
    [(IMPORTANCE, "importance"), (WITH_GAN, "dmd"),
     ({"stochastic-depth": {"remove": 0.2, "steps": 1, "by": "middle"}}, "stochastic-depth"),
     ({"pretrain": {"steps": 1}}, "pretrain")],
)  # fmt: skip
def test_passes_that_need_clips_say_so_before_any_work(folder: Path, step: dict[str, Any], name: str) -> None:
    path = recipe(folder, "needs-clips", {"latents": "prompts"}, [step], **SIZE)
    with pytest.raises(DataError) as refused:
        apply(path, folder / "run-needs")
    assert str(refused.value) == (
        f"{path}:1: data.latents: {folder}/prompts: this dataset holds prompts only, but {name} needs clips; "
        "encode one with --videos"
    )
    assert not (folder / "run-needs").exists()


def test_prompts_alone_have_no_size(folder: Path) -> None:
    path = recipe(folder, "no-size", {"latents": "prompts"}, [DMD])
    with pytest.raises(DataError) as refused:
        plan_recipe(path, folder / "run-size")
    assert str(refused.value) == (
        f"{path}:1: data.latents: {folder}/prompts: this dataset holds prompts only, which have no size; "
        "say in sampling: num_frames, height and width of what is sampled"
    )


def test_a_dataset_of_another_model_or_length_is_refused(folder: Path, tmp_path: Path) -> None:
    path = recipe(folder, "length", {"latents": "clips"}, [IMPORTANCE], max_sequence_length=8)
    with pytest.raises(DataError, match=r"its prompts are padded to 16 tokens, expected sampling\.max_sequence_length"):
        plan_recipe(path, tmp_path / "run")
    tiny_pipeline(tmp_path / "model", layers=2, seed=1)
    shutil.copytree(folder / "clips", tmp_path / "clips")
    path = recipe(tmp_path, "other", {"latents": "clips"}, [IMPORTANCE])
    with pytest.raises(DataError) as refused:
        plan_recipe(path, tmp_path / "run")
    assert str(refused.value) == (
        f"{path}:1: data.latents: {tmp_path}/clips: encoded by another text_encoder than that of {tmp_path}/model; "
        f"encode with --pipeline {tmp_path}/model"
    )


def test_a_dataset_for_another_pipeline_class_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "clips", folder / "first-frames")
    index = folder / "first-frames" / "index.json"
    index.write_text(index.read_text().replace('"WanPipeline"', '"WanImageToVideoPipeline"'))
    path = recipe(folder, "first-frames", {"latents": "first-frames"}, [IMPORTANCE])
    with pytest.raises(DataError) as refused:
        plan_recipe(path, tmp_path / "run")
    assert str(refused.value) == (
        f"{path}:1: data.latents: {folder}/first-frames: encoded for WanImageToVideoPipeline, expected WanPipeline; "
        "encode with --pipeline-class WanPipeline"
    )


def test_a_damaged_shard_is_found_before_any_work(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "clips", folder / "damaged")
    shard = folder / "damaged" / "clips-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    path = recipe(folder, "damaged", {"latents": "damaged"}, [IMPORTANCE])
    with pytest.raises(DataError, match=r"damaged/clips-00001\.safetensors: damaged \(its SHA-256 is not the one"):
        apply(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
