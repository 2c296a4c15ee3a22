"""A LoRA of a stock Wan on the pruned one: the same as on the whole model with the removed blocks skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from diffusers import WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flcompress.cli import main
from flcompress.driver.manager import apply, export
from flcompress.driver.rundir import RunDirectory
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.tracing.skip import skip
from tests.fixtures.tiny import tiny_pipeline

pytestmark = pytest.mark.e2e

MODULES = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj", "ffn.net.2")
ORIGINAL = ("self_attn.q", "self_attn.o", "cross_attn.k", "ffn.0", "ffn.2")
LAYERS, RANK, ALPHA = 5, 3, 6.0


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("remap")
    tiny_pipeline(folder / "model", layers=LAYERS)
    recipe = {
        "version": 1,
        "model": {"path": "model"},
        "sampling": {"num_inference_steps": 2, "max_sequence_length": 16},
        "data": {"moving-digits": {"clips": 4}},
        "passes": [{"prune": {"remove": 0.3, "by": "middle"}}],
        "exports": ["diffusers"],
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    done = apply(folder / "tiny.yaml", folder / "run")
    export(done)
    return done


def teacher(run: RunDirectory) -> Any:
    return load_transformer(run.start().components["transformer"])


def make_lora(model: torch.nn.Module, style: str) -> dict[str, torch.Tensor]:
    """A LoRA on five linear layers of every block and on proj_out, with an alpha where the style has one."""
    draw = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for index in range(LAYERS):
        for name, original in zip(MODULES, ORIGINAL, strict=True):
            weight = model.get_parameter(f"blocks.{index}.{name}.weight")
            down = torch.randn(RANK, weight.shape[1], generator=draw)
            up = torch.randn(weight.shape[0], RANK, generator=draw)
            if style == "diffusers":
                key = f"transformer.blocks.{index}.{name}"
                made |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
            else:
                key = {
                    "wan": f"diffusion_model.blocks.{index}.{original}",
                    "kohya": f"lora_unet_blocks_{index}_{original.replace('.', '_')}",
                    "bare": f"blocks.{index}.{name}",
                }[style]
                made |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
                made[f"{key}.alpha"] = torch.tensor(ALPHA)
    return made


def applied(model: Any, lora: dict[str, torch.Tensor]) -> Any:
    """W + alpha / rank B A on every module, found by the keys alone."""
    flat = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in model.named_modules()}
    names = dict(zip(ORIGINAL, MODULES, strict=True))
    flat |= {
        f"lora_unet_blocks_{index}_{old.replace('.', '_')}": f"blocks.{index}.{new}"
        for index in range(LAYERS)
        for old, new in names.items()
    }
    own_memory(model)
    used = 0
    for key, down in lora.items():
        for a, b in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            if not key.endswith(f".{a}.weight"):
                continue
            module = key.removesuffix(f".{a}.weight")
            name = flat.get(module, module.removeprefix("transformer.").removeprefix("diffusion_model."))
            head, _, rest = name.partition(".")
            index, _, rest = rest.partition(".")
            name = f"{head}.{index}.{names.get(rest, rest)}"
            scale = float(lora.get(f"{module}.alpha", torch.tensor(float(RANK)))) / RANK
            model.get_submodule(name).weight += scale * lora[f"{module}.{b}.weight"] @ down
            used += 1
    assert used == sum("lora_A" in key or "lora_down" in key for key in lora) > 0
    return model


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize("style", ["diffusers", "bare", "wan", "kohya"])
@torch.no_grad()
def test_it_does_what_it_did_with_those_blocks_skipped(run: RunDirectory, tmp_path: Path, style: str) -> None:
    model, program = teacher(run), run.final()
    lora = make_lora(model, style)
    save_file(lora, str(tmp_path / "lora.safetensors"), metadata={"format": "pt", "who": "me"})
    exported = run.exports / "diffusers"
    outputs: list[bytes] = []
    for place in (run.path, exported, exported / "transformer" / "kept_blocks.json"):
        out = tmp_path / f"out{len(outputs)}.safetensors"
        done = cli("remap-lora", tmp_path / "lora.safetensors", place, "--out", out, "--json")
        assert done.exit_code == 0, done.output
        summary = json.loads(done.stdout)
        assert set(summary["dropped"]) == set(program.prune_set)
        assert summary["modules"] == len(MODULES) * (LAYERS - len(program.prune_set))
        outputs.append(out.read_bytes())
    assert len(set(outputs)) == 1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors"] * 4
    with safe_open(str(out), "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}

    inputs = example_inputs(model)
    with skip(model, program.prune_set):
        without = model(**inputs).sample
        expected = applied(model, lora)(**inputs).sample
    small = load_transformer(exported / "transformer")
    assert isinstance(small, WanTransformer3DModel)
    actual = applied(small, load_file(str(out)))(**inputs).sample
    assert torch.equal(actual, expected)
    assert float((expected - without).abs().max()) > 0.01


LORAS: dict[str, dict[str, Any]] = {
    "every block": {"target_modules": ["to_q", "attn2.to_k", "ffn.net.2", "proj_out"]},
    "names": {"target_modules": [f"blocks.{index}.attn1.to_v" for index in range(LAYERS)]},
    "blocks by number": {
        "target_modules": ["to_q", "to_v"],
        "layers_to_transform": [0, 2, 4],
        "layers_pattern": "blocks",
    },
    "a regular expression": {"target_modules": r"blocks\.[0234]\.attn1\.to_(q|out\.0)"},
    "other ranks": {
        "target_modules": ["to_q", "to_v"],
        "rank_pattern": {"blocks.4.attn1.to_q": 5, r"blocks\.[03]\.attn2\.to_v": 2},
        "alpha_pattern": {"blocks.4.attn1.to_q": 1.0, r"blocks\.[0234]\.attn2\.to_v": 9.0},
    },
    "biases, scaled by the root of the rank": {"target_modules": ["to_q"], "lora_bias": True, "use_rslora": True},
    "weights in two parts": {"target_modules": ["to_q", "ffn.net.0.proj"], "use_dora": True},
}
"""What PEFT is asked for; five blocks, of which the pruned model lacks the second and third."""


@pytest.mark.filterwarnings("ignore:Adapter 'default':peft.utils.warning.PeftWarning")  # takes biases for broken halves
@pytest.mark.parametrize(
    ("name", "saved_by"),
    [*((name, "transformer") for name in LORAS), ("names", "pipeline"), ("other ranks", "pipeline")],
)
def test_a_lora_that_peft_trained(run: RunDirectory, tmp_path: Path, name: str, saved_by: str) -> None:
    """Trained, saved and loaded by the libraries' own doors: what it did with those blocks skipped, to the bit."""
    from diffusers import WanPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    model, program = own_memory(teacher(run)), run.final()
    inputs = example_inputs(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, **LORAS[name]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(3):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    file = "pytorch_lora_weights.safetensors"
    if saved_by == "transformer":
        model.save_lora_adapter(str(tmp_path / "lora"))
    else:
        layers, settings = get_peft_model_state_dict(model), _collate_lora_metadata({"transformer": model})
        WanPipeline.save_lora_weights(str(tmp_path / "lora"), layers, **settings)
    with torch.no_grad(), skip(model, program.prune_set):
        expected = model(**inputs).sample
        model.disable_lora()
        without = model(**inputs).sample
    assert float((expected - without).abs().max()) > 0.01

    (tmp_path / "out").mkdir()
    done = cli("remap-lora", tmp_path / "lora" / file, run.path, "--out", tmp_path / "out" / file)
    assert done.exit_code == 0, done.output
    if saved_by == "transformer":
        small = load_transformer(run.exports / "diffusers" / "transformer")
        small.load_lora_adapter(str(tmp_path / "out"), weight_name=file, prefix=None, use_safetensors=True)
    else:
        pipeline = WanPipeline.from_pretrained(str(run.exports / "diffusers"))
        pipeline.load_lora_weights(str(tmp_path / "out"), weight_name=file, use_safetensors=True)
        small = pipeline.transformer.eval()
    with torch.no_grad():
        actual = own_memory(small)(**inputs).sample
    assert torch.equal(actual, expected)


ADAPTERS: dict[str, Any] = {
    "LoRA with patterns": LoraConfig(
        r=3,
        target_modules=["to_q", "ffn.net.2"],
        rank_pattern={"blocks.4.attn1.to_q": 5, "blocks.1.attn1.to_q": 2},
        alpha_pattern={r"blocks\.[24]\.ffn\.net\.2": 16},
        modules_to_save=["proj_out"],
        bias="lora_only",
    ),
    "LoHa": LoHaConfig(r=3, alpha=6, target_modules=["to_q", "to_v"], rank_pattern={"blocks.4.attn1.to_v": 2}),
    "LoKr": LoKrConfig(r=3, alpha=6, target_modules=["to_q", "ffn.net.0.proj"], decompose_both=True),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_folder_that_peft_saved(run: RunDirectory, tmp_path: Path, kind: str) -> None:
    """PEFT's own folder, its settings renumbered with its weights, loaded again by PEFT on the pruned model."""
    model, program = own_memory(teacher(run)), run.final()
    inputs = example_inputs(model)
    torch.manual_seed(0)
    trained = get_peft_model(model, ADAPTERS[kind])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    trained.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "README.md").write_text("about it\n")
    with torch.no_grad(), skip(trained.get_base_model(), program.prune_set):
        expected = trained(**inputs).sample

    done = cli("remap-lora", tmp_path / "adapter", run.path, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "new" / "README.md").read_text() == "about it\n"
    small = own_memory(load_transformer(run.exports / "diffusers" / "transformer"))
    with torch.no_grad():
        actual = PeftModel.from_pretrained(small, str(tmp_path / "new"))(**inputs).sample
    assert torch.equal(actual, expected)
    settings = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert not any("blocks.4" in name or r"\.[24]" in name for name in settings["rank_pattern"])


def test_a_folder_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    out = tmp_path / "new"
    lora = {key.removeprefix("transformer."): tensor for key, tensor in make_lora(teacher(run), "diffusers").items()}
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "target_modules": ["to_q"]}

    def refused(message: str, given: Path = folder) -> None:
        failed = cli("remap-lora", given, run.path, "--out", out)
        assert (failed.exit_code, failed.stderr.count("\n")) == (2, 1)
        assert message in failed.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]

    refused(f"{folder}: has no adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(f"{folder}: has no adapter_model.safetensors")
    save_file(lora, str(folder / "adapter_model.safetensors"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"to_(q": 2}}))
    refused(f"{folder}/adapter_config.json: 'to_(q' given, expected a regular expression")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"blocks.4.attn1.to_q": RANK}}))
    refused("give the folder", folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    alone = cli("remap-lora", folder / "adapter_model.safetensors", run.path, "--out", tmp_path / "one.safetensors")
    assert alone.exit_code == 0, alone.output  # its settings say nothing of blocks


def own_memory(model: Any) -> Any:
    """The model; kernels round differently on weights that lie unaligned in a mapped file."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def test_the_summary_names_what_is_gone(run: RunDirectory, tmp_path: Path) -> None:
    save_file(make_lora(teacher(run), "diffusers"), str(tmp_path / "lora.safetensors"))
    summary = cli("remap-lora", tmp_path / "lora.safetensors", run.path, "--out", tmp_path / "out.safetensors").stdout
    removed = run.final().prune_set
    kept, moved = LAYERS - len(removed), sum(new != old for new, old in run.final().kept.items())
    assert summary.splitlines() == [
        f"{tmp_path / 'out.safetensors'}: {10 * kept} of {10 * LAYERS} keys used; {5 * kept} modules kept, {5 * moved} "
        f"of them in blocks with another number; {5 * len(removed)} dropped, which touched {len(removed)} removed or "
        "changed blocks:",
        *(f"  {block}: {', '.join(sorted(MODULES))}" for block in removed),
    ]


def test_bad_requests(run: RunDirectory, tmp_path: Path) -> None:
    lora, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    whole = make_lora(teacher(run), "diffusers")
    gone = run.final().prune_set
    save_file(
        {key: tensor for key, tensor in whole.items() if f"{key.split('.')[1]}.{key.split('.')[2]}" in gone}, str(lora)
    )
    (tmp_path / "lora.bin").touch()
    (tmp_path / "short.safetensors").write_bytes(lora.read_bytes()[:-1])
    (tmp_path / "kept_blocks.json").write_text('{"a": 1}')
    blocks = ", ".join(gone)
    for arguments, message in (
        (
            (lora, run.path),
            f"{lora}: all {5 * len(gone)} modules of this LoRA are in blocks that were removed ({blocks}); "
            "nothing of it is left",
        ),
        ((tmp_path / "none.safetensors", run.path), f"{tmp_path / 'none.safetensors'}: no such file; expected a LoRA"),
        (
            (tmp_path / "lora.bin", run.path),
            f"{tmp_path / 'lora.bin'}: only safetensors are read, a pickle can run code; save the LoRA as .safetensors",
        ),
        (
            (lora, tmp_path / "none"),
            f"{tmp_path / 'none'}: no run directory, no exported folder and no kept_blocks.json; expected one of them",
        ),
        (
            (lora, tmp_path),
            f'{tmp_path / "kept_blocks.json"}: no map of kept blocks; expected entries such as "blocks.1": "blocks.3"',
        ),
    ):
        failed = cli("remap-lora", *arguments, "--out", out)
        assert (failed.exit_code, failed.stderr) == (2, f"error: {message}\n")
        assert not out.exists()
    failed = cli("remap-lora", tmp_path / "short.safetensors", run.path, "--out", out)
    assert failed.stderr.startswith(f"error: {tmp_path / 'short.safetensors'}: not a whole safetensors file (")
    failed = cli("remap-lora", lora, run.path, "--out", lora)
    assert failed.stderr == f"error: --out: {lora} is what is read; give another file\n"
    failed = cli("remap-lora", lora, run.path, "--out", tmp_path / "no" / "out.safetensors")
    assert failed.stderr == f"error: --out: {tmp_path / 'no'}: no such folder; make it first\n"
