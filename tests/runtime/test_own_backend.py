"""A back end of another package, with an exporter: `torch.export` programs, run by torch on what they were traced at.

It is installed as pip would install it, and goes by name through everything that runs a student.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import Field

from flcompress import api
from flcompress.cli import main
from flcompress.driver.rundir import RunDirectory
from flcompress.exporters.shared.parity import cases, compare, outputs, reference
from flcompress.files import sha256
from flcompress.runtime.inputs import Denoiser, Inputs, arguments_of, constants_of, tensors_of
from flcompress.runtime.sizes import size_of
from tests.core.test_registry import install
from tests.evaluation.conftest import make_run

pytestmark = pytest.mark.e2e

PROMPT = "a three drifting up and left, fast"


class ProgramSession:
    device = "cpu"

    def __init__(self, file: Path, calls_to: Path | None) -> None:
        self._run, self._calls_to = torch.export.load(file).module(), calls_to

    def __call__(self, inputs: Inputs, /) -> torch.Tensor:
        if self._calls_to is not None:
            with self._calls_to.open("a", encoding="utf-8") as file:
                file.write(f"{inputs['timestep'].tolist()}\n")
        with torch.no_grad():
            output: torch.Tensor = self._run(dict(inputs))
        return output


class ProgramBackend(api.ExportBackend):
    """torch.export's programs.

    Attributes:
        calls_to: a file that gets a line a call.
    """

    name: ClassVar[str] = "program"
    label: ClassVar[str] = "Exported program"
    export: ClassVar[str] = "program"

    calls_to: Path | None = Field(None, description="file that gets a line a call")

    def session(self, folder: Path, manifest: Mapping[str, Any]) -> ProgramSession:
        return ProgramSession(folder / manifest["file"], self.calls_to)


class ProgramExporter(api.Exporter):
    """Write what torch.export traces, compared with torch by the back end that will run it."""

    name: ClassVar[str] = "program"

    def export(self, program: api.Program, folder: Path, exports: Path, progress: api.ProgressSink) -> dict[str, Any]:
        size, make = size_of(program), arguments_of(program)
        example, transformer = make(size, [1.0], 0), program.components["transformer"]
        denoiser = Denoiser(api.load_transformer(transformer), constants_of(example), torch.float32)
        file = folder / "model.pt2"
        torch.export.save(torch.export.export(denoiser, (tensors_of(example),)), file)
        inputs = cases(make, program.contract.timesteps, [size])
        by_torch = reference(transformer, constants_of(example), "fp32", inputs)
        exported = outputs(ProgramBackend().session(folder, {"file": file.name}), inputs)
        parity = compare(by_torch, exported, 1e-4).require(str(file), "trace it again")
        manifest = {
            "file": file.name,
            "sha256": sha256(file),
            "precision": "fp32",
            "contract": program.contract.to_dict(),
            "kept": dict(program.kept),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return {"difference": parity.difference}


def command(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (f"program = {__name__}:ProgramBackend", "[flcompress.exporters]", f"program = {__name__}:ProgramExporter")
    install(tmp_path, "flcompress.backends", "\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def run(installed: None, model: Path, tmp_path: Path) -> RunDirectory:
    made = make_run(tmp_path, model)
    told = command("export", made.path, "--format", "diffusers", "--format", "program", "--json", "--quiet")
    assert 0.0 <= json.loads(told)["program"]["difference"] <= 1e-4
    return made


def test_it_generates_and_is_timed(run: RunDirectory, tmp_path: Path) -> None:
    calls = tmp_path / "calls.txt"
    clips = []
    for backend in (("torch",), ("program", "--calls-to", calls)):
        out = tmp_path / f"{backend[0]}.png"
        command("generate", run.path, "--prompt", PROMPT, "--out", out, "--quiet", "--backend", *backend)
        with Image.open(out) as picture:
            clips.append(np.asarray(picture.convert("RGB")).astype(int))
    assert np.abs(clips[0] - clips[1]).max() <= 1  # one step of 255, where a value lies on the edge
    timesteps = run.final().contract.timesteps
    assert calls.read_text().splitlines() == [str([timestep]) for timestep in timesteps]
    results = json.loads(command("bench", run.path, "--backend", "program", "--rounds", "1", "--json", "--quiet"))
    assert [(row["backend"], row["precision"]) for row in results["rows"][2:]] == [
        ("Exported program (teacher: torch eager)", "fp32")
    ] * 2


def test_its_student_is_judged_beside_torchs(run: RunDirectory, tmp_path: Path) -> None:
    """A clip at a time, since the program takes no more; the same noises, so the same judgements."""
    calls = tmp_path / "calls.txt"
    size = ("--clips-per-prompt", "1", "--seeds", "2")
    told = command("eval", run.path, *size, "--backend", "program", "--calls-to", calls, "--json", "--quiet")
    results = json.loads(told)
    *_, student, behind = results["contenders"]
    assert (student["name"], behind["name"]) == ("student", "student-program")
    assert behind["label"] == f"{student['label']}, Exported program"
    assert behind["digit_accuracy"]["values"] == student["digit_accuracy"]["values"]
    assert behind["frechet"]["values"] == pytest.approx(student["frechet"]["values"], rel=1e-3)
    assert len(calls.read_text().splitlines()) == 2 * 32 * run.final().contract.num_inference_steps


def test_its_option_is_one_of_the_commands(installed: None) -> None:
    for name in ("generate", "bench", "eval"):
        shown = " ".join(command(name, "--help").split())
        assert "|program]" in shown
        assert "--calls-to VALUE Backend program: file that gets a line a call (a path)." in shown


def test_a_damaged_file_of_it_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    (run.exports / "program" / "model.pt2").write_bytes(b"half")
    command_line = ["generate", str(run.path), "--prompt", PROMPT, "--out", str(tmp_path / "a.gif")]
    told = CliRunner().invoke(main, [*command_line, "--backend", "program"])
    assert told.exit_code == 2
    assert "model.pt2: SHA-256" in told.stderr
    assert told.stderr.endswith(f"make it again with: flcompress export {run.path} --format program\n")
