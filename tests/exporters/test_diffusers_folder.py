"""The exported folder is a stock pipeline: diffusers loads it, and samples it as the contract says."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flcompress.core.program import Program
from flcompress.core.records import ContractPart, FactsFile
from flcompress.errors import PostconditionError
from flcompress.exporters.diffusers_folder import DiffusersExporter
from flcompress.exporters.shared.pipeline_folder import check_folder
from flcompress.exporters.shared.weights import store_in
from flcompress.frontend.recipe import arguments
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from flcompress.models.parts import open_parts
from flcompress.runtime.generate import denoise
from tests.fixtures.exports import silent
from tests.fixtures.rounding import require_rounded
from tests.training.comparing import FORWARD

pytestmark = pytest.mark.e2e

PROMPT = "a three drifting up and left, fast"


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder, to damage."""
    return Path(shutil.copytree(run / "exports" / "diffusers", tmp_path / "pipeline"))


def test_a_stock_call_makes_the_clip_that_the_runtime_makes(run: Path) -> None:
    from diffusers import WanPipeline

    folder = run / "exports" / "diffusers"
    facts = FactsFile.read(folder / "flcompress.json")
    pipeline = WanPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    stock = pipeline(PROMPT, **facts.call, output_type="latent").frames
    ours = denoise(as_network(load_transformer(folder / "transformer")), open_parts(folder), facts, PROMPT, seed=5)
    assert stock.shape == (1, 16, 3, 8, 8)
    planted = denoise(as_network(load_transformer(folder / "transformer")), open_parts(folder), facts, "a two", seed=5)
    require_rounded(ours, stock, facts.contract.num_inference_steps * FORWARD, planted=planted)


def test_a_guided_contract_is_sampled_as_stock_diffusers_samples_it(guided: Program, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    folder = tmp_path / "teacher"
    folder.mkdir()
    DiffusersExporter().export(guided, folder, tmp_path, silent)
    facts = FactsFile.read(folder / "flcompress.json")
    assert facts.call["guidance_scale"] == 4.0
    pipeline = WanPipeline.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(2)
    stock = pipeline(PROMPT, **facts.call, output_type="latent").frames
    ours = denoise(as_network(load_transformer(folder / "transformer")), open_parts(folder), facts, PROMPT, seed=2)
    weaker = replace(guided.contract, guidance_scale=3.0)
    told = facts.model_copy(update={"contract": ContractPart(**weaker.to_dict())})
    planted = denoise(as_network(load_transformer(folder / "transformer")), open_parts(folder), told, PROMPT, seed=2)
    require_rounded(ours, stock, guided.contract.evaluations * FORWARD, planted=planted)
    assert "The seed decides the\nstarting noise" in (folder / "README.md").read_text()


def test_weights_in_bf16_and_what_that_changes(run: Path, program: Program, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    told = DiffusersExporter(precision="bf16").export(program, tmp_path, tmp_path, silent)
    stored = load_file(run / "exports" / "diffusers" / "transformer" / "diffusion_pytorch_model.safetensors")
    written = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    by_diffusers = load_transformer(run / "exports" / "diffusers" / "transformer", dtype=torch.bfloat16).state_dict()
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: tensor.dtype for name, tensor in by_diffusers.items()
    }
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16, torch.float32}
    assert all(torch.equal(tensor, stored[name].to(tensor.dtype)) for name, tensor in written.items())
    assert sorted(path.name for path in (tmp_path / "transformer").iterdir()) == sorted(
        path.name for path in (run / "exports" / "diffusers" / "transformer").iterdir()
    )
    facts = FactsFile.read(tmp_path / "flcompress.json")
    assert (facts.precision, facts.difference) == ("bf16", told["difference"])
    assert facts.difference is not None
    assert facts.magnitude is not None
    assert 0.0 < facts.difference < 0.1 * facts.magnitude
    card = " ".join((tmp_path / "README.md").read_text().split())
    assert f"differs from that of the original weights in fp32 by {facts.difference:.2g} at most" in card


def test_shards_in_bf16_keep_their_index(run: Path, tmp_path: Path) -> None:
    exact = load_transformer(run / "exports" / "diffusers" / "transformer")
    exact.save_pretrained(str(tmp_path), max_shard_size="100KB")
    before = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    store_in(tmp_path, "bf16")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == before["weight_map"]
    loaded = load_transformer(tmp_path, dtype=torch.bfloat16).state_dict()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())
    assert all(torch.equal(tensor, exact.state_dict()[name].to(tensor.dtype)) for name, tensor in loaded.items())


def test_without_a_precision_nothing_is_said_of_it_and_keys_stay(run: Path) -> None:
    assert "precision" not in json.loads((run / "exports" / "diffusers" / "flcompress.json").read_text())
    assert arguments(DiffusersExporter()) == {}
    assert arguments(DiffusersExporter(precision="bf16")) == {"precision": "bf16"}


def test_what_lies_in_the_folder(run: Path, program: Program) -> None:
    folder = run / "exports" / "diffusers"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {path for path in files if not path.endswith((".json", ".safetensors", "README.md"))} == set()
    assert json.loads((folder / "transformer" / "kept_blocks.json").read_text()) == {
        "blocks.0": "blocks.0",
        "blocks.1": "blocks.2",
    }
    facts = FactsFile.read(folder / "flcompress.json")
    assert facts.contract.dump() == json.loads(json.dumps(program.contract.to_dict()))
    assert facts.call == {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "max_sequence_length": 16,
        "height": 32,
        "width": 32,
        "num_frames": 9,
    }
    assert facts.parameters == program.graph.parameters
    for path in folder.rglob("*.json"):
        assert "/tmp/" not in path.read_text(), path


def test_the_snippet_of_the_model_card_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (run / "exports" / "diffusers" / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    written: list[object] = []
    # export_to_video wants an extra package; everything before it is run as printed.
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda clip, path, fps: written.append(clip.shape))
    monkeypatch.chdir(run / "exports" / "diffusers")
    exec(compile(found.group(1), "README.md", "exec"), {})
    assert written == [(9, 32, 32, 3)]


def test_another_schedule_is_found_out(folder: Path, program: Program) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 3.0}))
    with pytest.raises(
        PostconditionError, match=r"scheduler: a stock pipeline would use sigmas \[1, 0\.89.*\], the model"
    ):
        check_folder(folder, program.pipeline_class, program.contract)


def test_a_missing_tensor_is_found_out(folder: Path, program: Program) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["blocks.1.attn1.to_q.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(PostconditionError, match=r"transformer: 1 missing keys, first blocks\.1\.attn1\.to_q\.weight"):
        check_folder(folder, program.pipeline_class, program.contract)


def test_a_tensor_without_a_place_is_found_out(folder: Path, program: Program) -> None:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 1}))
    with pytest.raises(PostconditionError, match=r"transformer: \d+ unexpected keys, first blocks\.1\."):
        check_folder(folder, program.pipeline_class, program.contract)
