"""A sweep as a user runs it: killed, resumed, with a cell that fails; processes, files and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.core.records import SweepFile
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import FlcompressError, RequestError
from flcompress.models.stock_files import folder_digest
from flcompress.progress import QuietDisplay
from flcompress.sweeps.request import read_request
from flcompress.sweeps.runner import run_sweep
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.slow

RECIPE = {
    "version": 1,
    "model": {"path": "model"},
    "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16},
    "data": {"moving-digits": {"clips": 140}},
    "training": {"health": {"samples": 0}, "log_to": []},
    "passes": [
        {"importance": {"draws": 8, "noise_levels": 2}},
        {"prune": {"remove": 0.2}},
        {"dmd": {"steps": 1, "batch": 2, "critic_updates": 1, "student_steps": 2}},
    ],
    "evaluation": {"clips_per_prompt": 1, "seeds": 2},
}
GREEDY: dict[str, Any] = {"name": "greedy", "set": {"*.remove": 0.9}}  # one block must stay, which only the work shows
SWEEP: dict[str, Any] = {
    "version": 1,
    "recipe": "base.yaml",
    "seeds": 1,
    "variants": [{"name": "base", "question": "the recipe"}, GREEDY, {"name": "whole", "without": ["prune"]}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny_pipeline(folder / "model", layers=3)
    (folder / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[Path, int]:
    """A sweep that is killed in its last cell; the results that it left, and when they were written."""
    command = [sys.executable, "-m", "flcompress", "sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = folder / "out/cells/whole/seed-0"
    while not list(last.glob("run/journal.jsonl")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _running(f'"folder": "{last}"'.encode()):
        time.sleep(0.05)
    return {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("result.json")}


@pytest.fixture(scope="module")
def printed(folder: Path, killed: dict[Path, int]) -> str:
    """The same command again, which resumes."""
    result = CliRunner().invoke(
        main, ["sweep", str(folder / "sweep.yaml"), "--out", str(folder / "out"), "--processes", "2", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    return result.output


def test_a_killed_sweep_leaves_no_process_and_resumes(folder: Path, killed: dict[Path, int], printed: str) -> None:
    done = folder / "out/cells/base/seed-0/result.json"
    assert done in killed
    assert folder / "out/cells/whole/seed-0/result.json" not in killed
    assert {file: file.stat().st_mtime_ns for file in killed} == killed


def test_cells_are_trained_judged_and_compared_with_the_base(folder: Path, printed: str) -> None:
    results = SweepFile.read(folder / "out/results.json")
    base, greedy, whole = results.cells
    assert (base.name, whole.name, results.base, results.seeds) == ("base", "whole", "base", 1)
    assert base.work_ratio is not None
    assert whole.work_ratio is not None
    assert base.calls is not None
    assert base.calls > 8.0  # a forward of each of importance's draws, at least
    assert whole.work_ratio == 2.0  # no guidance: half the evaluations
    assert base.work_ratio > 2.0
    assert (base.front, whole.front) == ("joint", "steps")
    assert base.speed_up is not None
    assert "one must stay" in (greedy.failed or "")
    assert [row.steps for row in results.teachers] == [2]
    difference = [a - b for a, b in zip(*(c.figures["frechet"].values for c in (whole, base)), strict=True)]
    assert whole.against_base["frechet"].values == difference
    assert not base.against_base
    runs = [RunDirectory(folder / f"out/cells/{name}/seed-0/run") for name in ("base", "whole")]
    assert len({folder_digest(run.final().components["transformer"]) for run in runs}) == 2
    for word in ("base", "whole", "greedy", "failed", "Fréchet"):
        assert word in printed


def test_passes_that_cells_share_run_once(folder: Path, printed: str) -> None:
    names = [path.name.rpartition("-")[0] for path in (folder / "out/store/passes").glob("[0-9]*")]
    assert names.count("01-importance") == 1
    assert sum(name.endswith("dmd") for name in names) == 2


def test_the_page_shows_fronts_figures_and_failures(folder: Path, printed: str) -> None:
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "one must stay" in page
    assert "src=" not in page
    assert "href=" not in page.replace('href="#', "")


def test_what_is_stored_is_not_done_again_and_json_is_the_file(folder: Path, printed: str) -> None:
    before = (folder / "out/results.json").read_text()
    (folder / "fewer.yaml").write_text(yaml.safe_dump({**SWEEP, "variants": [SWEEP["variants"][0]]}))
    files = {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("result.json")}
    result = CliRunner().invoke(
        main, ["sweep", str(folder / "fewer.yaml"), "--out", str(folder / "out"), "--quiet", "--json"]
    )
    (cell,) = json.loads(result.stdout)["cells"]
    assert cell["figures"] == json.loads(before)["cells"][0]["figures"]
    assert json.loads(result.stdout) == json.loads((folder / "out/results.json").read_text())
    assert {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("result.json")} == files


def test_a_folder_of_something_else_and_a_model_that_is_not_there_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(RequestError, match="holds something else than a sweep"):
        run_sweep(read_request(folder / "sweep.yaml"), tmp_path / "out", None, QuietDisplay())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    with pytest.raises(RequestError, match=r"cell base: .*no folder"):
        run_sweep(read_request(tmp_path / "sweep.yaml"), tmp_path / "new", None, QuietDisplay())
    assert not (tmp_path / "new").exists()
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {"latents": "encoded"}}))
    with pytest.raises(RequestError, match=r"cell base: data: latents given, expected moving-digits"):
        run_sweep(read_request(tmp_path / "sweep.yaml"), tmp_path / "new", None, QuietDisplay())
    assert not (tmp_path / "new").exists()


def test_a_sweep_of_which_every_cell_fails_fails(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.yaml").write_text(yaml.safe_dump({**SWEEP, "variants": [GREEDY]}))
    with pytest.raises(FlcompressError, match=r"every cell failed; the first: .*one must stay"):
        run_sweep(read_request(folder / "bad.yaml"), tmp_path / "out", None, QuietDisplay())


def _running(part: bytes) -> bool:
    """Return whether a process has this in its command line."""
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
        except OSError:
            continue
        if part in line and int(entry.name) != os.getpid():
            return True
    return False
