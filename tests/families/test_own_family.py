"""A family that the package does not have, defined in this module alone, goes through every command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,  # noqa: F401 (stock diffusers looks for it in a module that it loads a model from)
    WanPipeline,
    WanTransformer3DModel,
)
from typing_extensions import override

import flcompress
from flcompress.api import (
    ClipSize,
    Conditioning,
    Family,
    LatentShape,
    ModelError,
    RequestError,
    family_of,
    register_family,
)
from flcompress.models.families import registry
from flcompress.progress import QuietDisplay
from flcompress.runtime.tensorrt_api import installed
from tests.families.encoders import WIDTH, clip, tokenizer
from tests.fixtures.video_files import write_video

PROMPT = "a three drifting up"
SIZE = 9, 32, 32  # frames, height, width
RECIPE = """
version: 1
model: {model}
sampling:
  {{num_inference_steps: 4, guidance_scale: 3.0, max_sequence_length: 16, num_frames: 9, height: 32, width: 32}}
data: {{latents: {data}}}
training: {{health: {{on_breach: warn, samples: 2}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 2, batch: 4}}
  - stochastic-depth: {{remove: 0.1, steps: 1, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{inter_cfg: [3.0, 3.0], steps: 1, critic_updates: 1, batch: 2}}
exports: {exports}
"""


class DriftTransformer(WanTransformer3DModel):  # type: ignore[misc]
    """A stock class under a name of its own."""


class DriftPipeline(WanPipeline):  # type: ignore[misc]
    """Its text encoder is CLIP's, where Wan has a T5."""


class Drift(Family):
    """All that is known of it."""

    name: ClassVar[str] = "Drift"
    pipelines: ClassVar[tuple[str, ...]] = ("DriftPipeline",)
    transformers: ClassVar[tuple[str, ...]] = ("DriftTransformer",)
    attends_to_text: ClassVar[bool] = False

    @override
    def model_class(self, name: str) -> Any:
        return {"DriftPipeline": DriftPipeline, "DriftTransformer": DriftTransformer}[name]

    @override
    def arguments(
        self,
        config: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        guidance: float | None,
    ) -> dict[str, Any]:
        return {
            "hidden_states": x,
            "timestep": timestep,
            "encoder_hidden_states": conditioning["encoder_hidden_states"],
        }

    @override
    def example_conditioning(
        self, config: Any, batch: int, shape: LatentShape, tokens: int, draw: torch.Generator
    ) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.randn(batch, tokens, config["text_dim"], generator=draw)}

    @override
    def encode_prompts(
        self, pipeline: Any, config: Any, prompts: Sequence[str], length: int
    ) -> dict[str, torch.Tensor]:
        words = pipeline.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        device = pipeline.text_encoder.device
        states = pipeline.text_encoder(words.input_ids.to(device), words.attention_mask.to(device)).last_hidden_state
        return {"encoder_hidden_states": states * words.attention_mask[..., None].to(states)}

    @override
    def frame_rate(self, index: Any, config: Any) -> float:
        return 12.0

    @override
    def compression(self, autoencoder: Any) -> tuple[int, int]:
        return 4, 8

    @override
    def usual(self, config: Any) -> tuple[tuple[int, int], ClipSize]:
        return (4, 8), ClipSize(height=32, width=32, frames=9, tokens=16)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known until the test ends."""
    monkeypatch.setattr(registry, "_families", list(registry.known_families()))
    assert register_family(Drift) is Drift


def save_pipeline(folder: Path) -> Path:
    """Write a tiny random pipeline of the family, as its author would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DriftTransformer(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=4,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )
        autoencoder = AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            scale_factor_spatial=8,
            scale_factor_temporal=4,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipeline = DriftPipeline(tokenizer(), clip(), autoencoder.eval(), scheduler, transformer.eval())
        pipeline.save_pretrained(str(folder), safe_serialization=True)
    return folder


def encode(folder: Path, home: Path) -> Path:
    """Make a dataset of 16 clips."""
    frames, height, width = SIZE
    for number in range(16):
        write_video(home / "videos" / f"{number}.mp4", frames=frames, height=height, width=width, seed=number)
    captions = home / "captions.jsonl"
    captions.write_text("\n".join(json.dumps({"file": f"{number}.mp4", "caption": PROMPT}) for number in range(16)))
    flcompress.encode(
        folder,
        captions,
        home / "data",
        videos=home / "videos",
        max_sequence_length=16,
        display=QuietDisplay(),
    )
    return home / "data"


@pytest.mark.e2e
@pytest.mark.usefixtures("registered")
def test_an_own_family_goes_through_every_command(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model")
    inspection = flcompress.inspect(str(folder))
    assert inspection.graph.model_class == "DriftTransformer"
    assert inspection.clip == ClipSize(height=32, width=32, frames=9, tokens=16)

    exports, recipe = ["diffusers", "onnx"], tmp_path / "recipe.yaml"
    if installed("tensorrt-rtx"):
        exports.append("tensorrt")
    recipe.write_text(RECIPE.format(model=folder, data=encode(folder, tmp_path), exports=exports))
    assert [row.name for row in flcompress.plan(recipe).passes] == ["importance", "stochastic-depth", "prune", "dmd"]

    run = flcompress.apply(recipe, tmp_path / "run", display=QuietDisplay(), device="cpu")
    final = run.final()
    assert 0 < len(final.graph.blocks) < 4
    backends: tuple[Literal["torch", "onnx"], ...] = ("torch", "onnx")
    for backend in backends:
        clip = flcompress.generate(run.path, PROMPT, backend=backend, out=tmp_path / f"{backend}.png", seed=0)
        assert clip.stat().st_size > 0
    times = flcompress.bench(run.path, rounds=1, backends=backends, display=QuietDisplay())
    assert {row["what"] for row in times["rows"]} == {"denoising", "pipeline"}

    assert json.loads((run.path / "exports" / "diffusers" / "flcompress.json").read_text())["frame_rate"] == 12.0
    card = (run.path / "exports" / "diffusers" / "README.md").read_text()
    assert f"from {__name__} import DriftPipeline\n" in card
    pipeline = DriftPipeline.from_pretrained(str(run.path / "exports" / "diffusers"), use_safetensors=True)
    assert type(pipeline.transformer) is DriftTransformer
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"


def test_a_family_that_nobody_registered_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="DriftPipeline: no model family knows this class; expected a pipeline such"):
        family_of("DriftPipeline")
    folder = save_pipeline(tmp_path / "model")
    with pytest.raises(ModelError, match="_class_name is 'DriftPipeline', expected WanPipeline or"):
        flcompress.encode(folder, tmp_path / "captions.txt", tmp_path / "data")


@pytest.mark.usefixtures("registered")
def test_a_name_or_a_class_is_registered_once() -> None:
    class SameName(Drift):
        pipelines: ClassVar[tuple[str, ...]] = ("OtherPipeline",)
        transformers: ClassVar[tuple[str, ...]] = ("OtherTransformer",)

    class SameClass(Drift):
        name: ClassVar[str] = "Other"
        pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)

    register_family(Drift)  # the same class again: an entry point that names it, say
    known = registry.known_families()
    with pytest.raises(RequestError) as caught:
        register_family(SameName)
    assert str(caught.value) == (
        f"family 'Drift' in {__name__}: registered already, by Drift in {__name__}; rename one of the two"
    )
    assert caught.value.exit_status == 2
    with pytest.raises(RequestError) as caught:
        register_family(SameClass)
    assert str(caught.value) == (
        f"WanPipeline of family 'Other' in {__name__}: registered already, by Wan in flcompress.models.families.wan; "
        "rename one of the two"
    )
    assert registry.known_families() == known


def test_an_installed_package_brings_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    def entry(value: str) -> None:
        point = EntryPoint(name="drift", value=value, group=registry.FAMILY_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
        registry._load_entry_points.cache_clear()

    monkeypatch.setattr(registry, "_families", list(registry.known_families()))
    try:
        entry(f"{__name__}:Drift")
        assert type(family_of("DriftTransformer")) is Drift
        entry(f"{__name__}:Missing")
        with pytest.raises(RequestError, match=r"family 'drift': .*:Missing cannot be imported \(.*\)"):
            family_of("DriftTransformer")
        entry(f"{__name__}:DriftPipeline")
        with pytest.raises(RequestError, match=r"family 'drift': .*:DriftPipeline is not a subclass of Family"):
            family_of("DriftTransformer")
    finally:
        monkeypatch.undo()
        registry._load_entry_points.cache_clear()
