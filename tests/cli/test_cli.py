from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from flcompress.cli import main
from flcompress.driver import manager
from tests.fixtures.recipes import WriteRecipe

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("fake_steps")]


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["apply", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom flcompress.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'diffusers', 'transformers', 'pydantic', 'networkx', 'rich') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_apply_then_again(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [score, {cut: {keep: 0.5}}]\nexports: [text]\n")
    run = tmp_path / "run"
    first = cli("apply", path, "--run-dir", run)
    assert first.exit_code == 0, first.output
    assert first.stderr.splitlines()[-1] == f"done: {run}"
    again = cli("apply", path, "--run-dir", run, "--json", "--quiet")
    assert again.stderr == ""
    told = json.loads(again.stdout)
    assert [step["name"] for step in told["passes"]] == ["score", "cut"]
    exported = json.loads(cli("export", run, "--format", "copy", "--json", "--quiet").stdout)
    assert exported["copy"]["status"] == "ran"


def test_the_default_run_directory(write: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("apply", write("passes: [score]\n"), "--quiet").exit_code == 0
    assert (tmp_path / "runs" / "tiny" / "run.json").exists()


def test_a_plan_for_gpus(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [score, {cut: {keep: 0.5}}]\n")
    told = cli("plan", path, "--gpus", "2", "--memory", "80G")
    assert told.exit_code == 0, told.output
    assert "fsdp2" in told.stdout
    assert "memory: every pass fits a H100 with 80G" in told.stdout
    plan = json.loads(cli("plan", path, "--gpus", "2", "--memory", "80G", "--json").stdout)
    dry = json.loads(cli("apply", path, "--dry-run", "--gpu", "h100", "--json").stdout)
    assert [row["memory"] for row in plan["passes"]] == [row["memory"] for row in dry["passes"]]
    assert len(plan["passes"][1]["settings"]) == 24
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.yaml"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (("--memory", "80X"), "error: --memory: 80X given, expected a size such as 80G or 48GiB\n"),
        (("--gpus", "0"), "error: --gpus: 0 given, expected 1 or more\n"),
        (("--gpus", "3", "--set", "training.engine=ddp"), "expected a multiple of the 3 processes"),
    ],
)
def test_a_wrong_plan_is_one_line(write: WriteRecipe, asked: tuple[str, ...], told: str) -> None:
    failed = cli("plan", write("passes: [score, {cut: {keep: 0.5}}]\n"), *asked)
    assert failed.exit_code == 2
    assert told in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_dry_run_writes_nothing(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [score, {cut: {keep: 0.5}}]\n")
    told = cli("apply", path, "--run-dir", tmp_path / "run", "--dry-run")
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1] == "nothing was written"
    plan = json.loads(cli("apply", path, "--dry-run", "--json").stdout)
    assert plan["work_ratio"] == pytest.approx(25 * plan["parameters"] / plan["passes"][1]["parameters"])
    assert plan["passes"][1]["memory"]["roles"]["model"]["weights"] > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.yaml"]


def test_an_error_is_one_line(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [{cut: {keep: 0}}]\n")
    for extra in ((), ("--dry-run",)):
        failed = cli("apply", path, "--run-dir", tmp_path / "run", *extra)
        assert failed.exit_code == 2
        assert failed.stderr == (
            f"error: {path}:4: passes[0].cut.keep: 0 given, expected a number above 0 and of at most 1\n"
        )
        assert failed.stdout == ""
    assert not (tmp_path / "run").exists()


def test_failed_work_ends_with_status_1(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: [{broken: {how: training}}]\n")
    failed = cli("apply", path, "--run-dir", tmp_path / "run", "--quiet")
    assert failed.exit_code == 1
    assert failed.stderr == "error: broken: the loss is nan at update 3; expected a finite number\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    failed = cli("--debug", "apply", tmp_path / "none.yaml")
    assert type(failed.exception).__name__ == "RecipeError"


def test_inspect(model: Path) -> None:
    told = cli("inspect", model, "--tokens", "16")
    assert told.exit_code == 0, told.output
    assert "blocks.0" in told.stdout
    found = json.loads(cli("inspect", model / "transformer", "--json").stdout)
    assert len(found["blocks"]) == 4
    assert found["removals"][0]["parameters"] <= 0.7 * found["parameters"]
    failed = cli("inspect", model / "vae" / "nothing")
    assert failed.exit_code == 2
    assert failed.stderr.startswith("error: ")


def test_passes() -> None:
    listed = cli("passes")
    assert "  cut" in listed.stdout
    shown = cli("passes", "cut").stdout
    assert "Needs: scored" in shown
    assert "keep: a number above 0 and of at most 1; required" in shown
    described = json.loads(cli("passes", "score", "--json").stdout)
    assert described["arguments"][0] == {
        "name": "draws",
        "expected": "a whole number of at least 1",
        "default": "8",
        "required": False,
        "description": "how often it looks",
    }
    assert cli("passes", "cutt").stderr == "error: no pass or exporter 'cutt'; did you mean 'cut'?\n"


def test_commands_on_no_run(tmp_path: Path) -> None:
    for command in ("export", "report"):
        failed = cli(command, tmp_path)
        assert failed.exit_code == 2, failed.output
        assert failed.stderr.startswith(f"error: {tmp_path}")


def test_an_interruption_says_how_to_go_on(write: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manager, "apply", interrupted)
    stopped = cli("apply", write("passes: [score]\n"))
    assert stopped.exit_code == 130
    assert stopped.stderr == "interrupted; the same command resumes from here\n"


def truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def poison(weights: Path) -> None:
    tensors = load_file(weights)
    first = min(tensors)
    save_file({**tensors, first: torch.full_like(tensors[first], torch.nan)}, weights)


def pickle(weights: Path) -> None:
    weights.with_suffix(".bin").write_bytes(weights.read_bytes())
    weights.unlink()


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
@pytest.mark.parametrize("damage", [truncate, poison, pickle])
def test_a_damaged_model_is_refused(
    write: WriteRecipe, tmp_path: Path, model: Path, damage: Callable[[Path], None], dry_run: tuple[str, ...]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    damage(damaged / "transformer" / "diffusion_pytorch_model.safetensors")
    run = tmp_path / "run"
    failed = cli("apply", write("passes: [score]\n"), "--set", f"model.path={damaged}", "--run-dir", run, *dry_run)
    assert failed.exit_code == 2
    assert failed.stderr.startswith(f"error: {damaged}/transformer/")
    assert failed.stderr.count("\n") == 1
    assert not run.exists()


def test_every_command_and_option_is_explained() -> None:
    for name, command in main.commands.items():
        assert not command.get_short_help_str(64).endswith("..."), name  # 80 columns leave 64 for it
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts[0]}"
