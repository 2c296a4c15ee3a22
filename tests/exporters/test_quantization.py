"""Students in 8 bits: stock diffusers loads them from safetensors, and what that changes is stated."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.core.program import Program
from flcompress.core.records import FactsFile, Quantization
from flcompress.errors import ModelError, PostconditionError, RequestError, UnavailableError
from flcompress.exporters.diffusers_folder import DiffusersExporter
from flcompress.exporters.shared.pipeline_folder import check_folder
from flcompress.exporters.shared.quantization import layers_of, quantize_in
from flcompress.exporters.shared.weights import store_in
from flcompress.frontend.recipe import arguments
from flcompress.models.folder import check_parts, check_pipeline
from flcompress.models.loading import load_transformer, meta_transformer
from flcompress.models.shards import file_metadata, file_tensors, folder_tensors, write_file, write_tensors
from flcompress.runtime.generate import generate
from flcompress.runtime.torch_session import TorchSession, load_quantized, require_quantized
from tests.families.exports import exportable
from tests.fixtures.exports import silent

pytestmark = pytest.mark.e2e

PROMPT = "a three drifting up and left, fast"
KINDS = get_args(Quantization)
IN_A_BLOCK = [f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_k", "to_out.0", "to_q", "to_v")]
QUANTIZED = sorted(f"blocks.*.{name}" for name in (*IN_A_BLOCK, "ffn.net.0.proj", "ffn.net.2"))
TIME_AND_TEXT = ("text_embedder.linear_1", "text_embedder.linear_2", "time_embedder.linear_1", "time_embedder.linear_2")
OTHERS = [*(f"condition_embedder.{name}" for name in TIME_AND_TEXT), "condition_embedder.time_proj", "proj_out"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def runs(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Kind -> a run directory with the quantised export, and its summary."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        target = folder / "exports" / "diffusers"
        target.mkdir(parents=True)
        exporter = DiffusersExporter(precision="bf16", quantize=kind)
        made[kind] = folder, exporter.export(program, target, target, silent)
    return made


@pytest.fixture
def pipeline(runs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy of the int8 export, to damage."""
    return Path(shutil.copytree(runs["int8"][0] / "exports" / "diffusers", tmp_path / "pipeline"))


@contextmanager
def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        patch.setattr(torch.cuda, "get_device_name", lambda: "a card")
        yield


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_torchao(
    kind: Quantization, program: Program, runs: dict[str, tuple[Path, dict[str, Any]]]
) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, PerRow, quantize_

    folder = runs[kind][0] / "exports" / "diffusers" / "transformer"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    model = load_quantized(folder)
    own = load_transformer(program.components["transformer"], dtype=torch.bfloat16)
    config = Int8WeightOnlyConfig(granularity=PerRow(), version=2)
    if kind == "fp8":  # torchao quantises weights and activations on a GPU from sm89 on only; the weights are the same
        config = Float8WeightOnlyConfig(granularity=PerRow())
    quantize_(own, config, filter_fn=lambda layer, name: re.sub(r"\.\d+\.", ".*.", name, count=1) in QUANTIZED)
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    quantised = 0
    for name, weight in model.named_parameters():
        expected = own.get_parameter(name)
        assert type(weight.data) is type(expected.data), name
        if type(weight.data) is torch.Tensor:
            assert torch.equal(weight, expected), name
            assert weight.dtype == expected.dtype, name
        else:
            quantised += 1
            assert weight.qdata.dtype is dtype
            assert torch.equal(weight.qdata.float(), expected.qdata.float()), name
            assert torch.equal(weight.scale, expected.scale), name
            assert (weight.act_quant_kwargs is not None) is (kind == "fp8")
    assert quantised == len(QUANTIZED) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_changes_is_stated(kind: Quantization, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    run, summary = runs[kind]
    folder = run / "exports" / "diffusers"
    facts = FactsFile.read(folder / "flcompress.json")
    size = sum(tensor.size for tensor in folder_tensors(folder / "transformer").values())
    assert (facts.precision, facts.quantize) == ("bf16", kind)
    assert facts.quantized == {"transformer": QUANTIZED}
    assert facts.unquantized == {"transformer": OTHERS}
    assert facts.transformer_bytes == size
    assert size < sum(parameter.numel() * 2 for parameter in meta_transformer(folder / "transformer").parameters())
    assert facts.difference is not None
    assert facts.magnitude is not None
    assert 0.0 < facts.difference < 0.1 * facts.magnitude
    stated = {"precision": "bf16", "quantize": kind, "difference": facts.difference, "transformer_bytes": size}
    assert stated.items() <= summary.items()
    card_text = " ".join((folder / "README.md").read_text().split())
    version = importlib.metadata.version("torchao")
    assert f"Linear layers of the transformer are quantised by torchao {version}" in card_text
    assert f"The weights take {size:,} bytes. The output differs from that of the original weights in fp32" in card_text
    assert f"- not in `transformer`: {', '.join(f'`{name}`' for name in OTHERS)}" in card_text


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippet_of_the_model_card_runs(
    kind: Quantization, runs: dict[str, tuple[Path, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = runs[kind][0] / "exports" / "diffusers"
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    written: list[object] = []
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda clip, path, fps: written.append(clip.shape))
    monkeypatch.chdir(folder)
    exec(compile(snippet.group(1), "README.md", "exec"), {})
    assert written == [(9, 32, 32, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_generate_runs_it(
    kind: Quantization, runs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, summary = runs[kind]
    first = generate(run, PROMPT, "torch", tmp_path / "a.png", seed=3)
    assert capfd.readouterr() == ("", "")
    assert first.stat().st_size > 0
    session = TorchSession(run / "exports" / "diffusers" / "transformer", "cpu")
    assert session.precision == "bf16"
    tables = sum(buffer.nbytes for buffer in session.transformer.buffers())  # of positions, which are in no file
    assert session.nbytes - tables == summary["transformer_bytes"]


def test_shards_are_quantised_as_one_file_is(program: Program, tmp_path: Path) -> None:
    stored = program.components["transformer"]
    models = []
    for name, largest in (("whole", 10**9), ("shards", 30_000)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(stored / "config.json", folder)
        write_tensors(folder, folder_tensors(stored), largest)
        store_in(folder, "bf16")
        quantize_in(folder, "int8", layers_of(program, "int8"))
        models.append(load_quantized(folder))
    index = json.loads((tmp_path / "shards" / f"{WEIGHTS}.index.json").read_text())
    sizes = [tensor.size for tensor in folder_tensors(tmp_path / "shards").values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(set(index["weight_map"].values())) > 3
    inputs = {
        "hidden_states": torch.ones(1, 16, 3, 8, 8, dtype=torch.bfloat16),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.ones(1, 16, 64, dtype=torch.bfloat16),
    }
    with torch.no_grad():
        outputs = [model(**inputs).sample for model in models]
    assert torch.equal(*outputs)


def test_a_missing_scale_and_another_number_are_noticed(pipeline: Path, program: Program) -> None:
    path = pipeline / "transformer" / WEIGHTS
    whole, name = path.read_bytes(), "blocks.1.attn1.to_q._weight_scale"
    tensors = file_tensors(path)
    write_file(path.with_name("short"), {key: tensors[key] for key in tensors if key != name}, file_metadata(path))
    path.with_name("short").rename(path)
    message = r"transformer: blocks\.1\.attn1\.to_q\.weight has numbers without a scale, or a scale without numbers"
    with pytest.raises(ModelError, match=message):
        check_parts(pipeline, quantized=True)
    with pytest.raises(ModelError, match=message):
        load_quantized(path.parent)
    start = tensors["blocks.1.attn1.to_q._weight_qdata"].start
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    with pytest.MonkeyPatch.context() as patch:  # as a loader that returns something else would
        patch.setattr("flcompress.exporters.shared.pipeline_folder.folder_tensors", lambda folder: tensors)
        other = path.with_name("other")
        other.write_bytes(whole)
        tensors = {key: replace(tensor, file=other) for key, tensor in tensors.items()}
        with pytest.raises(PostconditionError, match=r"another value for tensor blocks\.1\.attn1\.to_q\._weight_qdata"):
            check_folder(pipeline, program.pipeline_class, program.contract)


def test_it_is_no_model_to_compress(pipeline: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: quantization_config is of torchao; quantised weights are not"):
        check_pipeline(pipeline)


@pytest.mark.parametrize(
    ("name", "quantized", "others"),
    [
        ("flux", {"single_transformer_blocks.*.proj_out"}, {"proj_out", "transformer_blocks.*.norm1.linear"}),
        ("qwen-image", {"transformer_blocks.*.img_mlp.net.2"}, {"transformer_blocks.*.img_mod.1", "img_in"}),
        ("mochi", {"transformer_blocks.*.ff.net.2"}, {"transformer_blocks.*.norm1.linear", "proj_out"}),
    ],
)
def test_modulation_and_what_stands_around_the_blocks_stay(
    name: str, quantized: set[str], others: set[str], tmp_path: Path
) -> None:
    layers = layers_of(exportable(name, tmp_path), "int8")
    assert quantized <= set(layers.quantized)
    assert others <= set(layers.others)
    assert not layers.holds("proj_out.weight")
    assert not layers.holds(f"{layers.quantized[0].replace('*', '0')}.bias")
    assert layers.holds(f"{layers.quantized[0].replace('*', '11')}.weight")


def test_sizes_that_fp8_does_not_take(tmp_path: Path) -> None:
    program, target = exportable("wan", tmp_path), tmp_path / "export"
    target.mkdir()
    with pytest.raises(
        RequestError,
        match=r"^diffusers\.quantize: fp8 given, but the blocks of this WanTransformer3DModel have no linear layer on "
        "tokens whose sizes are multiples of 16; leave quantize out$",
    ):
        DiffusersExporter(precision="bf16", quantize="fp8").export(program, target, tmp_path, silent)
    assert list(target.iterdir()) == []


def test_a_recipe_that_asks_for_what_does_not_fit(tmp_path: Path) -> None:
    given = {
        "{quantize: int8}": "quantize: int8 given without a precision, but what is not quantised computes in bf16; set "
        "precision: bf16",
        "{precision: bf16, quantize: int4}": "int4 given, expected one of fp8, int8 or null",
    }
    for value, message in given.items():
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: {{path: model}}\npasses: [importance]\nexports:\n  - diffusers: {value}\n")
        result = CliRunner().invoke(main, ["apply", str(recipe)])
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
    assert arguments(DiffusersExporter(precision="bf16", quantize="fp8")) == {"precision": "bf16", "quantize": "fp8"}
    assert arguments(DiffusersExporter(precision="bf16")) == {"precision": "bf16"}


def test_without_torchao_it_is_refused_before_any_work(
    runs: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, folder = DiffusersExporter(precision="bf16", quantize="int8"), runs["int8"][0]
    exporter.check()
    stock = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else stock(name))
        with pytest.raises(
            UnavailableError,
            match=r"^diffusers\.quantize: int8: torchao, which quantised weights need, is not installed; pip install "
            r"'flcompress\[quantize\]'$",
        ):
            exporter.check()
        DiffusersExporter(precision="bf16").check()
        with pytest.raises(UnavailableError, match=r"transformer: torchao, which .* is not installed"):
            generate(folder, PROMPT, "torch", tmp_path / "clip.gif")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.15.0")
    with pytest.raises(UnavailableError, match=r"torchao, which .*, 0\.15\.0 is installed, expected 0\.18 or newer;"):
        exporter.check()


def test_what_cannot_run_it_is_refused_before_any_work(
    runs: dict[str, tuple[Path, dict[str, Any]]], program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp8 = runs["fp8"][0] / "exports" / "diffusers" / "transformer"
    in_int8 = runs["int8"][0] / "exports" / "diffusers" / "transformer"
    with pytest.raises(RequestError, match=r"^--precision: fp32 given, but the weights of .*transformer are quantised"):
        generate(runs["int8"][0], PROMPT, "torch", tmp_path / "clip.gif", options={"precision": "fp32"})
    with card(monkeypatch, (8, 6)):
        with pytest.raises(
            UnavailableError,
            match=r"transformer: the weights are fp8, which a card \(sm86\) cannot multiply; run it on a GPU from sm89 "
            r"on, or export with diffusers\.quantize: int8$",
        ):
            require_quantized(in_fp8, "cuda", None)
        require_quantized(in_int8, "cuda", "bf16")
        require_quantized(program.components["transformer"], "cuda", "fp16")
    with card(monkeypatch, (8, 9)):
        require_quantized(in_fp8, "cuda", None)
