"""`flcompress eval` of any family by the suite `proxies`: prompts, first frames, contenders, resuming, bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

import flcompress
from flcompress.cli import main
from flcompress.core.records import ClipLine, EvalFile, ScoreLine
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import DataError, FlcompressError, RequestError
from flcompress.evaluation.clips.samplers import ProgramMaker
from flcompress.evaluation.clips.stock import StockFile
from flcompress.progress import QuietDisplay
from flcompress.runtime.clip_folder import read_frames
from tests.families.pipelines import EXPERTS, EXPORTED
from tests.families.test_bench import make_run
from tests.training import processes

pytestmark = pytest.mark.e2e

PROMPTS = ["a three drifting up", 'a/b: "quoted" \\ and so on, ' + "word " * 300, "数字の三 é", "数字の四"]


class Lines(QuietDisplay):
    """A display that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def write_inputs(folder: Path, *, images: bool = False) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, PROMPTS[0]]) + "\n", encoding="utf-8")
    if not images:
        return {"prompts": prompts}
    (folder / "images").mkdir()
    for number in range(len(PROMPTS)):  # another ratio than the clips', which are cropped
        picture = np.full((50, 80, 3), 40 * number, np.uint8)
        picture[:, 40:] = 200
        Image.fromarray(picture).save(folder / "images" / f"{number}.png")
    return {"prompts": prompts, "images": folder / "images"}


def evaluate(run: RunDirectory, **options: Any) -> dict[str, Any]:
    return flcompress.evaluate(run, **{"seeds": 2, "clips_per_prompt": 1, "display": QuietDisplay(), **options})


@pytest.fixture(scope="module")
def evaluated(
    pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDirectory, dict[str, Path], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("evaluated")
    run, inputs = make_run(pipeline_folder("wan"), "wan", folder), write_inputs(folder / "inputs")
    return run, inputs, evaluate(run, **inputs)


Evaluated = tuple[RunDirectory, dict[str, Path], dict[str, Any]]


def test_every_contender_makes_every_clip_once(evaluated: Evaluated) -> None:
    run, _, results = evaluated
    assert [row["name"] for row in results["contenders"]] == ["teacher-4", "student"]
    assert (results["prompts"], results["seeds"], results["clips"]) == (4, 2, 8), "the duplicate is one prompt"
    assert EvalFile.read(run.path / "eval" / "proxies" / "results.json").dump() == results
    frames, height, width = EXPORTED["wan"].size
    for row in results["contenders"]:
        clips = sorted((run.path / row["folder"]).glob("*.mp4"))
        assert len(clips) == 8
        assert read_frames(clips[0]).shape == (frames, height, width, 3)
        assert all(len(clip.name.encode()) < 100 and clip.name.isascii() for clip in clips)
    assert len(ScoreLine.read_lines(run.path / "eval" / "proxies" / "clips.jsonl")) == 16
    assert list(results["seconds"]) == ["sampling", "decoding", "judging"]
    assert all(value > 0.0 for value in results["seconds"].values())
    told = CliRunner().invoke(main, ["report", str(run.path)])
    assert "Time over all clips and processes: sampling " in told.output


def test_contenders_are_paired_on_the_same_prompts(evaluated: Evaluated) -> None:
    _, _, results = evaluated
    teacher, student = results["contenders"]
    (found,) = [row for row in results["paired"] if row["metric"] == "saturation"]
    assert (found["a"], found["b"]) == ("student", "teacher-4")
    assert found["mean"] == pytest.approx(student["saturation"]["mean"] - teacher["saturation"]["mean"])
    assert found["low"] <= found["mean"] <= found["high"]
    assert "teacher_psnr" not in teacher
    assert 0.0 < student["teacher_psnr"]["mean"] < 100.0


def test_a_second_evaluation_samples_and_measures_nothing(
    evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, inputs, results = evaluated
    monkeypatch.setattr(ProgramMaker, "clip", None)
    assert evaluate(run, **inputs) == results


def test_a_killed_evaluation_resumes_clip_by_clip(
    evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing, broken or strange is named; only what is missing is sampled, to the same figures."""
    run, inputs, results = evaluated
    shutil.copytree(run.path, tmp_path / "run")
    copied = RunDirectory(tmp_path / "run")
    student = copied.path / results["contenders"][1]["folder"]
    clips = sorted(student.glob("*.mp4"))
    clips[0].unlink()
    clips[1].write_bytes(clips[1].read_bytes()[:100])
    (student / "stranger.mp4").write_bytes(b"")
    sampled = 0
    clip = ProgramMaker.clip

    def counted(self: ProgramMaker, *given: Any) -> Any:
        nonlocal sampled
        sampled += 1
        return clip(self, *given)

    monkeypatch.setattr(ProgramMaker, "clip", counted)
    display = Lines()
    assert evaluate(copied, **inputs, display=display)["contenders"] == results["contenders"]
    assert sampled == 2
    assert "2 clips are missing or not as they were written" in display.lines[0]
    assert "1 files that no evaluation wrote are ignored (stranger.mp4)" in display.lines[1]


@pytest.mark.slow
def test_two_processes_share_the_clips(evaluated: Evaluated, tmp_path: Path) -> None:
    run, inputs, results = evaluated
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    size = ["--seeds", "2", "--clips-per-prompt", "1"]
    arguments: list[str | Path] = ["eval", tmp_path / "run", "--prompts", inputs["prompts"], *size, "--quiet"]
    processes.run(arguments, tmp_path / "output", processes=2)
    folder = tmp_path / "run" / "eval" / "proxies"
    shared = EvalFile.read(folder / "results.json").dump()
    assert sorted(path.name for path in folder.glob("measured-*")) == ["measured-0.jsonl", "measured-1.jsonl"]
    for row, alone in zip(shared["contenders"], results["contenders"], strict=True):
        clips = [ClipLine.read_lines(tmp_path / "run" / row["folder"] / f"manifest-{rank}.jsonl") for rank in range(2)]
        assert list(map(len, clips)) == [4, 4]
        assert row["folder"] == alone["folder"]
        for figure in ("saturation", "contrast"):  # processes with other threads round otherwise
            assert row[figure]["mean"] == pytest.approx(alone[figure]["mean"], rel=0.01)


def test_a_dry_run_counts_and_writes_nothing(evaluated: Evaluated, tmp_path: Path) -> None:
    run, inputs, _ = evaluated
    fresh = tmp_path / "more.txt"
    fresh.write_text("another prompt\n", encoding="utf-8")
    before = sorted(run.path.rglob("*"))
    plan = evaluate(run, prompts=fresh, seeds=3, dry_run=True)
    assert [(row["missing"], row["evaluations"]) for row in plan["contenders"]] == [(3, 24), (3, 6)]
    assert "not known" in plan["text"]
    assert sorted(run.path.rglob("*")) == before
    assert [row["missing"] for row in evaluate(run, **inputs, dry_run=True)["contenders"]] == [0, 0]


def test_the_report_shows_the_suite(evaluated: Evaluated) -> None:
    run, _, _ = evaluated
    page = flcompress.report(run).read_text(encoding="utf-8")
    assert page.count("<video") == 4
    assert "Motion, pixels at 256" in page
    assert "look here first" in page
    assert "Quality was not measured" not in page


@pytest.mark.parametrize("name", ["wan-i2v", "cogvideox-i2v", "hunyuan-video-i2v-replace"])
def test_models_that_start_from_an_image(pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    run, inputs = make_run(pipeline_folder(name), name, tmp_path), write_inputs(tmp_path / "inputs", images=True)
    results = evaluate(run, **inputs)
    for row in results["contenders"]:
        assert {"first_frame_psnr", "first_frame_ssim", "first_frame_decay"} <= set(row)
    with pytest.raises(RequestError, match=r"--prompts: .* given without --images; a .* makes a clip from its first"):
        evaluate(run, prompts=inputs["prompts"])


def test_an_image_model_has_no_motion(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    run = make_run(pipeline_folder("flux"), "flux", tmp_path)
    row = evaluate(run, **write_inputs(tmp_path / "inputs"))["contenders"][0]
    assert not {"flow", "proxy_dynamic", "proxy_smoothness", "flicker"} & set(row)
    assert {"saturation", "sharpness", "diversity"} <= set(row)


def test_both_experts_make_clips(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    name = next(iter(EXPERTS))
    run = make_run(pipeline_folder(name), name, tmp_path, "model.expert=high", "sampling.guidance_scale_2=2.0")
    assert [row["name"] for row in evaluate(run, **write_inputs(tmp_path / "inputs"))["contenders"]][-1] == "student"


def test_another_run_and_a_stock_folder_as_contenders(
    evaluated: Evaluated, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The same weights behind the stock pipeline give the teacher's clips, from the same noise."""
    run, inputs, _ = evaluated
    other = make_run(pipeline_folder("wan"), "wan", tmp_path)
    stock = tmp_path / "stock.yaml"
    stock.write_text(
        f"path: {pipeline_folder('wan')}\nname: stock\n"
        "call: {num_inference_steps: 4, guidance_scale: 3.0, max_sequence_length: 16}\n"
    )
    results = evaluate(run, **inputs, against=[other.path, stock])
    rows = {row["name"]: row for row in results["contenders"]}
    assert list(rows) == ["teacher-4", "student", "recipe", "stock"]
    assert rows["recipe"]["teacher_psnr"]["values"] == rows["student"]["teacher_psnr"]["values"]
    assert rows["stock"]["teacher_psnr"]["low"] > 40.0


def save_svd(folder: Path) -> Path:
    """A tiny Stable Video Diffusion, whose denoiser is a UNet."""
    import torch
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=8,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
        transformer_layers_per_block=1,
    )
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    vision = CLIPVisionConfig(
        hidden_size=32, projection_dim=32, num_hidden_layers=1, num_attention_heads=4, image_size=224,
        intermediate_size=37, patch_size=56,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        sigma_max=700.0, sigma_min=0.002, timestep_spacing="leading", timestep_type="continuous",
        use_karras_sigmas=True,
    )  # fmt: skip
    StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(crop_size=32, size=32),
    ).save_pretrained(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler scheduler
def test_models_that_only_their_stock_pipeline_samples(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A UNet next to a transformer, each behind its stock pipeline: the paper's comparison rows in small."""
    run = make_run(pipeline_folder("cogvideox-i2v"), "cogvideox-i2v", tmp_path)
    inputs = write_inputs(tmp_path / "inputs", images=True)
    files = []
    stock = {
        "svd": (save_svd(tmp_path / "svd"), ""),
        "cog": (pipeline_folder("cogvideox-i2v"), "max_sequence_length: 16"),
    }
    for name, (folder, more) in stock.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(f"path: {folder}\nname: {name}\ncall: {{num_inference_steps: 2, {more}}}\n")
    for picture in sorted(inputs["images"].iterdir())[1:]:
        picture.unlink()
    inputs["prompts"].write_text(PROMPTS[0], encoding="utf-8")
    results = evaluate(run, **inputs, against=files)
    rows = {row["name"]: row for row in results["contenders"]}
    assert list(rows)[-2:] == ["svd", "cog"]
    clip = ClipLine.read_lines(run.path / rows["svd"]["folder"] / "manifest-0.jsonl")[0]
    assert (clip.frames, clip.height, clip.width, clip.frame_rate) == (*EXPORTED["cogvideox-i2v"].size, 7)
    assert "first_frame_ssim" in rows["svd"]


@pytest.mark.parametrize("path", sorted((Path(flcompress.__file__).parents[1] / "recipes" / "against").glob("*.yaml")))
def test_the_comparison_files_name_arguments_that_their_pipelines_take(path: Path, tmp_path: Path) -> None:
    import inspect

    import diffusers

    names = {"svd-xt": "StableVideoDiffusionPipeline", "cogvideox-5b-i2v": "CogVideoXImageToVideoPipeline"}
    stock = StockFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    known = inspect.signature(getattr(diffusers, names[path.stem]).__call__).parameters
    assert set(stock.call) <= set(known)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: nowhere\ncall: {}\n", "nowhere/model_index.json"),
        ("name: x\n", "path: Field required; expected path, and name, frame_rate and call"),
        ("path: [\n", "expected path, and name, frame_rate and call if wanted"),
    ],
)
def test_files_that_name_no_pipeline(evaluated: Evaluated, tmp_path: Path, text: str, message: str) -> None:
    run, inputs, _ = evaluated
    path = tmp_path / "stock.yaml"
    path.write_text(text)
    with pytest.raises(FlcompressError, match=message):
        evaluate(run, **inputs, against=[path])


def test_an_argument_that_the_pipeline_lacks(
    evaluated: Evaluated, pipeline_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run, inputs, _ = evaluated
    path = tmp_path / "stock.yaml"
    path.write_text(f"path: {pipeline_folder('wan')}\ncall: {{steps: 3}}\n")
    with pytest.raises(RequestError, match=r"call.steps: a WanPipeline takes no such argument; it takes prompt"):
        evaluate(run, **inputs, against=[path])


def test_requests_that_cannot_be_met(evaluated: Evaluated, tmp_path: Path) -> None:
    run, inputs, _ = evaluated
    with pytest.raises(RequestError, match=r"its recipe has no data, so there are no held-out prompts; give --prompts"):
        evaluate(run)
    with pytest.raises(RequestError, match=r"--images: .* given, but a WanPipeline starts from text alone"):
        evaluate(run, **inputs, images=tmp_path)
    with pytest.raises(DataError, match=r"no\.txt: no such captions file"):
        evaluate(run, prompts=tmp_path / "no.txt")
    with pytest.raises(RequestError, match=r"--against: .* no run .run.json., no diffusers pipeline folder"):
        evaluate(run, **inputs, against=[tmp_path])
    with pytest.raises(RequestError, match=r"seeds: 1 and clips_per_prompt: 1 given, expected at least 2 and 1"):
        evaluate(run, **inputs, seeds=1)


def test_pictures_that_do_not_fit(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    run, inputs = make_run(pipeline_folder("wan-i2v"), "wan-i2v", tmp_path), write_inputs(tmp_path / "i", images=True)
    (inputs["images"] / "9.png").write_bytes(b"no picture")
    with pytest.raises(RequestError, match=r"9\.png: not a picture that can be read"):
        evaluate(run, **inputs)
    (inputs["images"] / "9.png").unlink()
    (inputs["images"] / "0.png").unlink()
    with pytest.raises(RequestError, match=r"--images: 3 pictures in .*, but 4 distinct prompts in"):
        evaluate(run, **inputs)
