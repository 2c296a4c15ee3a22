"""VBench-I2V without VBench: the worker's protocol in fake mode, and means, averages and intervals of its scores."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.core.suites import SuiteRequest
from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.evaluation.vbench.processes import Interpreter, Job
from flcompress.evaluation.vbench.scores import (
    BACKGROUND,
    DIMENSIONS,
    SUBJECT,
    ClipScores,
    Tally,
    averages,
    draw_counts,
    score_tables,
)
from flcompress.evaluation.vbench.suite import VBenchI2V, spread_over_kinds
from flcompress.progress import QuietDisplay
from tests.fixtures.fake_vbench import interpreter, write_repo

PAPER = {
    "Euler": (0.982, 0.461, 0.653, 0.711, 0.790),
    "DMD2": (0.977, 0.160, 0.583, 0.683, 0.716),
    "LCM": (0.979, 0.003, 0.570, 0.665, 0.684),
    "MagicDistillation": (0.980, 0.561, 0.634, 0.701, 0.798),
    "FastLightGen": (0.983, 0.500, 0.656, 0.717, 0.794),
}
"""Motion smoothness, dynamic degree, aesthetic and imaging quality, and the average that is printed beside them."""

MEAN_OF_4 = {"Euler": 0.702, "DMD2": 0.601, "LCM": 0.554, "MagicDistillation": 0.719, "FastLightGen": 0.714}
MEAN_OF_2 = {"Euler": 0.967, "DMD2": 0.947, "LCM": 0.944, "MagicDistillation": 0.956, "FastLightGen": 0.954}
"""What two further dimensions must be on average for six of them to give the printed average."""


@pytest.mark.parametrize("model", PAPER)
def test_the_papers_average_is_that_of_six_and_not_of_four(model: str) -> None:
    *four, printed = PAPER[model]
    dimensions = dict(
        zip(("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"), four, strict=True)
    )
    assert averages(dimensions) == {"average4": pytest.approx(MEAN_OF_4[model], abs=0.0006)}
    both = dict.fromkeys(("i2v_subject", "i2v_background"), MEAN_OF_2[model])
    assert averages(dimensions | both)["average6"] == pytest.approx(printed, abs=0.001)


def test_the_leaderboards_total() -> None:
    """By its own formula, written out: (quality + I2V) / 2, the weights 1 but .5 (dynamic) and .1 (camera)."""
    dimensions = dict.fromkeys(DIMENSIONS, 0.9) | {"dynamic_degree": 0.4, "motion_smoothness": 0.98}
    subject, background = (0.9 - 0.1462) / (1 - 0.1462), (0.9 - 0.2615) / (1 - 0.2615)
    smooth = (0.98 - 0.706) / (0.9975 - 0.706)
    quality = (subject + background + smooth + 0.9 + 0.9 + 0.5 * 0.4) / 5.5
    assert averages(dimensions)["total"] == pytest.approx((quality + (subject + background) / 2) / 2)
    camera = (subject + background + 0.1 * 0.3) / 2.1
    assert averages(dimensions | {"camera_motion": 0.3})["total"] == pytest.approx((quality + camera) / 2)


def clips(seed: int, prompts: int = 8, *, frames: int = 9, lift: float = 0.0) -> list[ClipScores]:
    """Two clips of every prompt, half of them of subjects, with random scores."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(prompts):
        dimensions = SUBJECT if number % 2 else BACKGROUND
        for clip in range(2):
            scores = {name: float(draw.uniform(0.2, 0.8)) + lift for name in dimensions}
            made.append(
                ClipScores(
                    prompt=str(number), file=f"{number}-{clip}.mp4", dimensions=dimensions, scores=scores, frames=frames
                )
            )
    return made


def estimate(made: Sequence[ClipScores]) -> dict[str, float]:
    tally = Tally(made)
    return {name: float(value[0]) for name, value in tally.scores(np.ones((1, len(tally.prompts)))).items()}


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(16)))
def test_figures_do_not_depend_on_the_order_of_clips(order: list[int]) -> None:
    made = clips(0)
    assert estimate([made[index] for index in order]) == pytest.approx(estimate(made), rel=1e-12)


def test_consistencies_are_means_over_frames_and_others_over_clips() -> None:
    short, long = clips(1)[2], replace(clips(1)[3], frames=41)
    found = estimate([short, long, *clips(1)[:2]])
    name = "subject_consistency"
    assert found[name] == pytest.approx((8 * short.scores[name] + 40 * long.scores[name]) / 48)
    assert found["i2v_subject"] == pytest.approx((short.scores["i2v_subject"] + long.scores["i2v_subject"]) / 2)


def test_a_missing_clip_fails() -> None:
    made = clips(2)
    lacking = replace(made[5], scores={**made[5].scores, "i2v_subject": 0.5})
    lacking = replace(lacking, scores={k: v for k, v in lacking.scores.items() if k != "imaging_quality"})
    with pytest.raises(
        FlcompressError, match=r"2-1\.mp4: has no imaging_quality; a missing clip would change the mean"
    ):
        Tally([*made[:5], lacking])


def table(ours: Sequence[ClipScores], theirs: Sequence[ClipScores]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = {"teacher-50": {"name": "teacher-50"}, "student": {"name": "student"}}
    contenders, paired = score_tables({"teacher-50": Tally(theirs), "student": Tally(ours)}, rows)
    return contenders, {row["metric"]: row for row in paired}


def test_differences_are_paired_over_prompts() -> None:
    contenders, paired = table(clips(3), clips(3, lift=0.1))
    assert (paired["average4"]["a"], paired["average4"]["b"]) == ("student", "teacher-50")
    for name in ("average4", "average6", "i2v_background"):
        assert paired[name]["mean"] == pytest.approx(-0.1)
        assert paired[name]["low"] == pytest.approx(paired[name]["high"])
        interval = contenders[0][name]
        assert interval["low"] < interval["mean"] < interval["high"]
    assert len(contenders[0]["i2v_subject"]["values"]) == 4
    assert contenders[0]["average6"]["values"] == []


def test_equal_models_are_told_apart_in_one_of_twenty_draws() -> None:
    covered = []
    for seed in range(30):
        _, paired = table(clips(2 * seed, 24), clips(2 * seed + 1, 24))
        covered.append(paired["average6"]["low"] <= 0.0 <= paired["average6"]["high"])
    assert 0.85 <= np.mean(covered) <= 1.0


def test_every_kind_of_prompt_keeps_its_number() -> None:
    counts = draw_counts([SUBJECT] * 5 + [BACKGROUND] * 3)
    assert (counts[:, :5].sum(axis=1) == 5).all()
    assert (counts[:, 5:].sum(axis=1) == 3).all()
    assert (draw_counts([SUBJECT]) == 1).all()


def test_a_sample_has_every_kind_in_proportion() -> None:
    entries = [{"prompt_en": f"{n:02d}", "image_type": "animal" if n % 4 else "indoor"} for n in range(40)]
    for count in (4, 8, 20):
        chosen = spread_over_kinds(entries)[:count]
        assert sum(entry["image_type"] == "indoor" for entry in chosen) == count // 4
    assert spread_over_kinds(entries[::-1]) == spread_over_kinds(entries)


PYTHON = Path(sys.executable)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    folder = tmp_path_factory.mktemp("clips")
    made = []
    for name in ("motion_smoothness", "dynamic_degree"):
        for number in range(5):
            path = folder / f'a "quoted" prompt, 数-{number}.mp4'
            path.write_bytes(bytes([number]))
            made.append(Job(key=f"{name} {number}", dimension=name, video=str(path), image=None, frame_rate=8.0))
    return made


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repo(tmp_path_factory.mktemp("VBench"))


def judged(python: Path, repo: Path, jobs: Sequence[Job], folder: Path, devices: int = 1) -> dict[str, float]:
    answers = Interpreter(python=python, repo=repo).judge(jobs, ["cpu"] * devices, folder, lambda: None)
    return dict(answers)


def test_three_workers_judge_as_one(repo: Path, jobs: Sequence[Job], tmp_path: Path) -> None:
    whole = judged(PYTHON, repo, jobs, tmp_path)
    assert set(whole) == {job.key for job in jobs}
    assert judged(PYTHON, repo, jobs, tmp_path, devices=3) == whole
    assert judged(PYTHON, repo, jobs[:1], tmp_path, devices=3) == {jobs[0].key: whole[jobs[0].key]}
    assert Interpreter(python=PYTHON, repo=repo).describe()["name"] == "fake"


@pytest.mark.parametrize(
    ("after", "kept", "message"),
    [
        ("| head -n 3; exit 9", 3, r"the worker ended with exit status 9 at .*-3\.mp4, motion_smoothness \(.*log: "),
        ("| sed '3s/.*/Loading RAFT/'", 2, r"the worker printed 'Loading RAFT' at .*-2\.mp4, motion_smoothness, "),
        ("| sed '2s/, \"value.*/}/'", 1, r"the worker printed .* at .*-1\.mp4, motion_smoothness, expected the clip's"),
        ("| sed '2s/value.*/value\": NaN}/'", 9, r"-1\.mp4, motion_smoothness: nan given, expected a number"),
        ('| sed \'2s/value.*/error": "broken"}/\'', 9, r"-1\.mp4, motion_smoothness: broken; what was judged before"),
        ("| sed '$s/$/\\n{}/'", 10, r"the worker printed '\{\}' at its end"),
    ],
)
def test_what_a_broken_worker_judged_is_kept_and_the_clip_is_named(
    repo: Path, jobs: Sequence[Job], tmp_path: Path, after: str, kept: int, message: str
) -> None:
    answers = Interpreter(python=interpreter(tmp_path / "python", after), repo=repo).judge(
        jobs, ["cpu"], tmp_path, lambda: None
    )
    stored: list[str] = []
    with pytest.raises(FlcompressError, match=message) as caught:
        stored.extend(key for key, _ in answers)
    assert len(stored) == kept
    assert "the same command continues" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_worker_that_dies_does_not_end_the_others(repo: Path, jobs: Sequence[Job], tmp_path: Path) -> None:
    broken = interpreter(tmp_path / "python", "| if test $5 = cpu:0; then head -n 1; else cat; fi")
    answers = Interpreter(python=broken, repo=repo).judge(jobs, ["cpu:0", "cpu:1"], tmp_path, lambda: None)
    stored: list[str] = []
    with pytest.raises(FlcompressError, match="the worker"):
        stored.extend(key for key, _ in answers)
    assert len(stored) == 1 + len(jobs) // 2


def test_an_interpreter_without_vbench_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError, match=r"cannot import VBench \(motion_smoothness: ModuleNotFoundError: No mod"
    ):
        Interpreter(python=PYTHON, repo=tmp_path).describe()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            None,
            RequestError,
            r"--vbench-python: .*python cannot be run \(No such file or directory\); expected the Pyth",
        ),
        (
            "echo some >&2; echo 'no torch here' >&2; exit 3",
            UnavailableError,
            r"--vbench-python: .*: no torch here; see",
        ),
        ("echo Python 3", UnavailableError, r"--vbench-python: .*: exit status 0; see"),
    ],
)
def test_what_is_no_interpreter_is_one_line(
    tmp_path: Path, text: str | None, error: type[FlcompressError], message: str
) -> None:
    if text is not None:
        (tmp_path / "python").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "python").chmod(0o755)
    with pytest.raises(error, match=message):
        Interpreter(python=tmp_path / "python", repo=tmp_path).describe()


def test_missing_weights_are_named_and_those_that_are_there_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout whose modules can be imported, and a folder that gets what VBench reads, file by file."""
    for package, names in (
        ("vbench", (*SUBJECT[:5], "background_consistency")),
        ("vbench2_beta_i2v", ("i2v_subject", "i2v_background")),
    ):
        (tmp_path / package).mkdir()
        for name in names:
            (tmp_path / package / f"{name}.py").touch()
    cache = tmp_path / "cache"
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(cache))
    judge = Interpreter(python=PYTHON, repo=tmp_path)
    with pytest.raises(UnavailableError) as caught:
        judge.describe()
    message = str(caught.value)
    assert message.startswith("VBench's weights: 13 files are missing: ")
    for name in (
        "amt_model/amt-s.pth",
        "raft_model/models/raft-things.pth",
        "dreamsim_model/ensemble_lora/adapter_model.safetensors",
    ):
        assert str(cache / name) in message
    for name in message.partition("missing: ")[2].partition(";")[0].split(", "):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"weights")
    described = judge.describe()
    assert described["name"] == "vbench"
    assert len(described["weights"]) == 13
    assert set(described["weights"].values()) == {hashlib.sha256(b"weights").hexdigest()}


FASTVIDEO = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "third_party" / "eval" / "vbench"))

def get_cache_dir():
    return Path(os.environ["FASTVIDEO_EVAL_CACHE"])

class Metric:
    def __init__(self, name):
        self.name = name
    def to(self, device):
        return self
    def setup(self):
        pass
    def compute(self, sample):
        skipped = {} if sample["fps"] else {"skipped": "missing 'fps'"}
        return SimpleNamespace(score=None if skipped else len(sample["video"]) / sample["fps"], details=skipped)

get_metric = Metric
"""
"""The names that the worker takes from FastVideo's evaluation."""


@pytest.fixture
def fastvideo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Interpreter:
    """A checkout with FastVideo's layout, no weights, and a judge that counts bytes."""
    files = {
        "eval/__init__.py": FASTVIDEO,
        "third_party/eval/vbench/vbench/utils.py": "",
        "eval/io/video.py": "def load_video(path):\n    return open(path, 'rb').read()\n",
        **{f"eval/metrics/vbench/{name}/metric.py": "" for name in DIMENSIONS if not name.startswith("i2v_")},
    }
    for name, content in files.items():
        path = tmp_path / "FastVideo" / "fastvideo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setenv("FASTVIDEO_EVAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Interpreter(python=PYTHON, repo=tmp_path / "FastVideo")


def test_fastvideos_weights_are_named_too(fastvideo: Interpreter, tmp_path: Path) -> None:
    with pytest.raises(
        UnavailableError,
        match=r"^FastVideo's weights: 8 files are missing: .*/cache/models/amt-s\.pth, .*/torch/hub/pyiqa/musiq.*, "
        r"raft-things\.pth of huggingface\.co/sbalani/raft-things; .* FASTVIDEO_EVAL_CACHE names another folder",
    ) as caught:
        fastvideo.describe()
    *files, _ = str(caught.value).partition("missing: ")[2].partition(";")[0].split(", ")
    raft = tmp_path / "hub" / "models--sbalani--raft-things"
    files.append(str(raft / "snapshots" / ("0" * 40) / "raft-things.pth"))
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"weights")
    (raft / "refs").mkdir()
    (raft / "refs" / "main").write_text("0" * 40)
    described = fastvideo.describe()
    assert described["name"] == "fastvideo"
    assert len(described["weights"]) == 8
    assert set(described["weights"].values()) == {hashlib.sha256(b"weights").hexdigest()}


def test_fastvideo_judges_by_its_own_metrics(fastvideo: Interpreter, jobs: Sequence[Job], tmp_path: Path) -> None:
    assert set(DIMENSIONS) - set(fastvideo.dimensions) == {"i2v_subject", "i2v_background"}
    assert fastvideo.vbench == fastvideo.repo / "fastvideo" / "third_party" / "eval" / "vbench"
    answers = fastvideo.judge(jobs, ["cpu"], tmp_path, lambda: None)
    assert dict(answers) == {job.key: 1 / 8.0 for job in jobs}, "one byte at 8 a second"
    answers = fastvideo.judge([replace(jobs[0], frame_rate=0.0)], ["cpu"], tmp_path, lambda: None)
    with pytest.raises(FlcompressError, match="ValueError: missing 'fps'"):
        list(answers)


def test_a_fastvideo_that_lacks_a_package_is_one_line(fastvideo: Interpreter) -> None:
    (fastvideo.repo / "fastvideo" / "eval" / "metrics" / "vbench" / "imaging_quality" / "metric.py").write_text(
        "import pyiqa_of_old"
    )
    with pytest.raises(
        UnavailableError, match=r"cannot import FastVideo \(imaging_quality: ModuleNotFoundError: No mod"
    ):
        fastvideo.describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            "--vbench-python: not given; the suite vbench-i2v needs the Python of VBench's environment and a checkout",
        ),
        ({"own": {"vbench_python": PYTHON}}, "--vbench-repo: not given; the suite"),
        (
            {"own": {"vbench_python": PYTHON, "vbench_repo": ".", "sample": 3}, "prompts": Path("mine.txt")},
            "--sample: 3 given with --prompts; it is for VBench's own prompts alone",
        ),
    ],
)
def test_what_the_suite_needs_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        VBenchI2V().evaluate(SuiteRequest(run=Path("run"), display=QuietDisplay(), **options))
