"""`flcompress eval --suite vbench-i2v` from the run to the report, its judge in fake mode."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flcompress
from flcompress.core.records import EvalFile, ScoreLine
from flcompress.errors import DataError, FlcompressError, RequestError
from flcompress.evaluation.clips.samplers import ProgramMaker
from flcompress.evaluation.vbench.processes import Interpreter
from flcompress.evaluation.vbench.scores import BACKGROUND, SUBJECT
from tests.families.test_bench import make_run
from tests.families.test_evaluation import Lines, evaluate
from tests.fixtures.fake_vbench import interpreter, write_repo

pytestmark = pytest.mark.e2e

PYTHON = Path(sys.executable)


def test_an_evaluation_by_vbench(
    pipeline_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker dies half way first; then all is judged, shown, and not judged again."""
    run = make_run(pipeline_folder("cogvideox-i2v"), "cogvideox-i2v", tmp_path)
    repo = write_repo(tmp_path / "VBench", ['a dog\'s day, "running"', "a cat"], ["a room"])
    own = {"vbench_repo": repo, "vbench_python": PYTHON}
    suite = {"suite": "vbench-i2v", "own": own}
    plan = evaluate(run, **suite, seeds=None, clips_per_prompt=None, dry_run=True)
    assert (plan["prompts"], plan["seeds"], plan["clips_per_prompt"]) == (3, 5, 1), "the protocol's five clips"
    broken = interpreter(tmp_path / "python", "| head -n 10")
    with pytest.raises(FlcompressError, match=r"the worker .* at .*/videos/.*-\d\.mp4, .*kept, and the same command"):
        evaluate(run, **{**suite, "own": {**own, "vbench_python": broken}})
    folder = run.path / "eval" / "vbench-i2v"
    kept = (folder / "measured-0.jsonl").read_text().splitlines()
    assert len(kept) == 10
    display = Lines()
    monkeypatch.setattr(ProgramMaker, "clip", None)
    results = evaluate(run, **suite, display=display)
    assert (folder / "measured-0.jsonl").read_text().splitlines()[:10] == kept
    assert len((folder / "measured-0.jsonl").read_text().splitlines()) == 2 * 2 * (2 * len(SUBJECT) + len(BACKGROUND))
    assert any(line.startswith("note: 3 of VBench's 3 prompts with 2 clips each, where") for line in display.lines)
    assert results["judge"]["name"] == "fake"
    assert EvalFile.read(folder / "results.json").dump() == results
    for row in results["contenders"]:
        assert {"average4", "average6", "total", *SUBJECT, *BACKGROUND} <= set(row)
        names = sorted(path.name for path in (folder / "videos" / Path(row["folder"]).name).iterdir())
        assert names == [
            f"{prompt}-{n}.mp4" for prompt in ("a cat", 'a dog\'s day, "running"', "a room") for n in (0, 1)
        ]
    scores = ScoreLine.read_lines(folder / "clips.jsonl")
    assert {frozenset(score.figures) for score in scores} == {frozenset(SUBJECT), frozenset(BACKGROUND)}
    page = flcompress.report(run).read_text(encoding="utf-8")
    assert "Average of 6" in page
    assert "Judged by fake; SHA-256 of 0 weight files in results.json." in page
    assert "vbench-i2v" in page
    monkeypatch.setattr(Interpreter, "judge", None)
    assert evaluate(run, **suite) == results
    fastvideo = tmp_path / "FastVideo"
    write_repo(fastvideo / "fastvideo/third_party/eval/vbench", ['a dog\'s day, "running"', "a cat"], ["a room"])
    (fastvideo / "fastvideo" / "eval").mkdir()
    (fastvideo / "fake-vbench.json").touch()
    without = evaluate(run, suite="vbench-i2v", own={**own, "vbench_repo": fastvideo}, display=display)
    assert any(line.startswith("note: judged by FastVideo's evaluation, which lacks I2V") for line in display.lines)
    assert {figure["key"] for figure in results["figures"]} - {figure["key"] for figure in without["figures"]} == {
        "average6", "total", "i2v_subject", "i2v_background"
    }  # fmt: skip
    for row, whole in zip(without["contenders"], results["contenders"], strict=True):
        assert row["average4"] == whole["average4"]
    for picture in (repo / "vbench2_beta_i2v" / "data" / "crop" / "1-1").iterdir():
        picture.unlink()
    with pytest.raises(
        DataError, match=r"crop/1-1: 2 of 2 pictures are missing, such as '.*'; get them with sh vbench2"
    ):
        evaluate(run, **{**suite, "own": {**own, "sample": 2}})


def test_models_and_sizes_that_vbench_does_not_judge(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    repo = write_repo(tmp_path / "VBench", ["a cat"])
    own = {"vbench_repo": repo, "vbench_python": PYTHON}
    suite = {"suite": "vbench-i2v", "own": own}
    with pytest.raises(RequestError, match="a WanPipeline starts from text alone; it judges models that make a clip"):
        evaluate(make_run(pipeline_folder("wan"), "wan", tmp_path), **suite)
    (tmp_path / "i2v").mkdir()
    run = make_run(pipeline_folder("wan-i2v"), "wan-i2v", tmp_path / "i2v")
    with pytest.raises(
        RequestError, match=r"dynamic degree looks at \d of the \d frames at 16 a second, expected at leas"
    ):
        evaluate(run, **suite)
    info = repo / "vbench2_beta_i2v" / "vbench2_i2v_full_info.json"
    info.write_text(json.dumps([{"prompt": "a"}]))
    (tmp_path / "cog").mkdir()
    run = make_run(pipeline_folder("cogvideox-i2v"), "cogvideox-i2v", tmp_path / "cog")
    with pytest.raises(
        RequestError, match=r"--vbench-repo: .*full_info\.json: cannot be read \(KeyError.*expected a ch"
    ):
        evaluate(run, **suite)
