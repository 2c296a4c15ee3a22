"""On a real GPU: parity with the CPU, memory against the plan, a whole recipe. `make test-gpu` runs it, in minutes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.driver.manager import apply
from flcompress.driver.start import trace_folder
from flcompress.models.families import family_of
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer, transformer_class
from flcompress.models.network import as_network, half_precision
from flcompress.planning.activations import saved_activations
from flcompress.progress import QuietDisplay
from tests.families.pipelines import save
from tests.fixtures.rounding import relative, rounding
from tests.fixtures.tiny import tiny_pipeline

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SHAPE, TOKENS = (21, 60, 104), 512
"""Latents of 81 frames at 480p, and the length of their prompts."""
RECIPE = """
version: 1
model: {model}
sampling: {{num_inference_steps: 2, max_sequence_length: 16}}
data: {{moving-digits: {{clips: 8}}}}
training: {{precision: bf16, health: {{on_breach: warn, samples: 1}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 1, batch: 8}}
  - stochastic-depth: {{remove: 0.1, steps: 2, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{student_steps: 2, steps: 2, critic_updates: 1, batch: 2}}
"""


def prediction(folder: Path, device: str, dtype: torch.dtype | None) -> torch.Tensor:
    model = load_transformer(folder / "transformer", device, dtype)
    family, draw = family_of(type(model).__name__), torch.Generator().manual_seed(0)
    shape = family.fixed_latents(model.config) or (2, 4, 4)
    conditioning = family.example_conditioning(model.config, 2, shape, 16, draw)
    x = torch.randn(2, family.channels(model.config), *shape, generator=draw)
    given = {name: tensor.to(device) for name, tensor in conditioning.items()}
    with torch.no_grad():
        predicted = as_network(model)(x.to(device), torch.tensor([300.0, 700.0], device=device), given)
    return predicted.float().cpu()


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox"])
def test_predictions_are_those_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder = save(name, tmp_path / "model")
    exact = prediction(folder, "cpu", None)
    assert relative(prediction(folder, "cuda", None), exact) < rounding(10_000)
    assert relative(prediction(folder, "cuda", torch.bfloat16), exact) < 0.05


def real_size(folder: Path, layers: int = 8) -> Path:
    """Copy Wan 1.3B's configuration, with fewer blocks."""
    copy = Path(shutil.copytree(RECIPES / "configs" / "wan2.1-t2v-1.3b" / "transformer", folder / "transformer"))
    config = json.loads((copy / "config.json").read_text()) | {"num_layers": layers}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def random_model(folder: Path, device: str, dtype: torch.dtype) -> Any:
    stock = transformer_class(folder)
    model = stock.from_config(stock.load_config(folder))
    single = set(model._keep_in_fp32_modules or ())
    for name, parameter in model.named_parameters():
        if not single & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def most_allocated(work: Callable[[], Any]) -> int:
    """Return the bytes that a call takes at most, over what is allocated before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def arguments(model: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    inputs = example_inputs(model, latent_shape=SHAPE, tokens=TOKENS)
    return {name: value.to(device, dtype if value.ndim > 2 else None) for name, value in inputs.items()}


def test_a_frozen_forward_takes_the_planned_memory(tmp_path: Path) -> None:
    folder = real_size(tmp_path)
    graph = trace_folder(folder, TOKENS, SHAPE)
    planned = saved_activations(folder, graph, TOKENS, SHAPE, "bf16", gpu=True).inference.of(1)
    model = random_model(folder, "cuda", torch.bfloat16)
    inputs = arguments(model, "cuda", torch.bfloat16)
    with torch.no_grad():
        model(**inputs)  # cuBLAS and cuDNN take their workspaces
        assert most_allocated(lambda: model(**inputs)) == pytest.approx(planned, rel=0.1)


def test_an_update_takes_the_planned_memory(tmp_path: Path) -> None:
    folder = real_size(tmp_path)
    saved = saved_activations(folder, trace_folder(folder, TOKENS, SHAPE), TOKENS, SHAPE, "bf16", gpu=True)
    model = random_model(folder, "cuda", torch.float32).train()
    model.enable_gradient_checkpointing()
    inputs = arguments(model, "cuda", torch.float32)

    def step() -> None:
        with half_precision("cuda", enabled=True):
            model(**inputs, return_dict=False)[0].float().square().mean().backward()

    step()  # gradients are there from now on
    assert most_allocated(step) == pytest.approx(saved.training(1, 1.0, True), rel=0.1)


def test_a_recipe_runs_and_says_what_it_took(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_pipeline(tmp_path / "model", layers=4)))
    run = apply(recipe, tmp_path / "run", display=QuietDisplay())
    records = [entry.record for entry in run.entries()[1:]]
    assert all(record.peak_gpu_mb and record.peak_gpu_reserved_mb for record in records)
    assert all((record.peak_gpu_reserved_mb or 0) >= (record.peak_gpu_mb or 0) for record in records)


def test_repeatable_sums_give_the_same_weights_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_pipeline(tmp_path / "model", layers=4)))
    runs = [
        apply(recipe, tmp_path / name, overrides=["training.deterministic=true"], display=QuietDisplay())
        for name in ("first", "second")
    ]
    first, second = ((run.final().components["transformer"]) for run in runs)
    files = [sorted(folder.glob("*.safetensors")) for folder in (first, second)]
    assert files[0]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
