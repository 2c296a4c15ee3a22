"""The door for authors of passes, exporters, back ends and families."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from flcompress import api
from flcompress.cli import main
from tests.fixtures.recipes import WriteRecipe

DOCUMENT = Path(__file__).parents[2] / "docs" / "writing-a-pass.md"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_it_loads_nothing() -> None:
    code = "import sys, flcompress.api; print([n for n in ('torch', 'pydantic', 'networkx') if n in sys.modules])"
    assert python(code) == "[]"


def test_what_it_opens() -> None:
    assert api.__all__ == [
        "Backend",
        "Block",
        "BlockGraph",
        "ClipContext",
        "ClipSize",
        "ClipSuite",
        "Conditioning",
        "Cost",
        "DataError",
        "Draws",
        "Engine",
        "EngineName",
        "ExportBackend",
        "ExportManifest",
        "Exporter",
        "Fact",
        "Family",
        "Feed",
        "Figure",
        "FlcompressError",
        "Health",
        "Hyper",
        "LatentDataset",
        "LatentShape",
        "Loss",
        "Measurement",
        "ModelError",
        "NotRemovable",
        "OpenNetwork",
        "Optimisation",
        "OriginalNames",
        "Pass",
        "PassContext",
        "PostconditionError",
        "Precision",
        "PreconditionError",
        "Program",
        "ProgressSink",
        "RequestError",
        "Role",
        "SamplingContract",
        "TokenAxes",
        "TrainedRole",
        "Training",
        "TrainingError",
        "TransformerFiles",
        "UnavailableError",
        "Watch",
        "World",
        "as_network",
        "encode_clips",
        "engine_of",
        "family_of",
        "generator",
        "load_transformer",
        "register_family",
        "save_transformer",
        "train",
    ]
    assert all(getattr(api, name) is not None for name in api.__all__)
    assert set(api.__all__) <= set(dir(api))


def test_what_it_does_not_open() -> None:
    with pytest.raises(AttributeError, match=r"module 'flcompress\.api' has no attribute 'nothing'"):
        api.nothing  # type: ignore[attr-defined] # noqa: B018


def test_the_documented_pass_uses_the_door_alone() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert set(re.findall(r"flcompress\.\w+", text)) == {"flcompress.api", "flcompress.passes", "flcompress.exporters"}
    assert set(re.findall(r"\bapi\.(\w+)", text)) <= set(api.__all__)


def test_the_documented_pass_is_applied_from_its_own_package(
    write: WriteRecipe, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, declared, passes = re.findall(r"```\w+\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    package, metadata = tmp_path / "site" / "my_package", tmp_path / "site" / "my_package-1.0.dist-info"
    for folder in (package, metadata):
        folder.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "scale.py").write_text(code, encoding="utf-8")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    ((group, points),) = tomllib.loads(declared)["project"]["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {reference}" for name, reference in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    run = tmp_path / "run"
    done = CliRunner().invoke(main, ["apply", str(write(passes)), "--run-dir", str(run), "--quiet"])
    assert done.exit_code == 0, done.output
    (stored,) = run.glob("passes/01-scale*/transformer")
    before, after = (
        load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (model / "transformer", stored)
    )
    assert torch.equal(after["proj_out.weight"], 0.5 * before["proj_out.weight"])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "proj_out.weight")
