"""Wan 2.2 A14B's two experts: one recipe compresses one of them, a second the other, and stock diffusers agrees."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.core.records import FactsFile
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.experts import Expert
from flcompress.driver.manager import apply, check, export
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import components_of, model_index
from flcompress.errors import RequestError
from flcompress.evaluation.bench import bench
from flcompress.evaluation.contenders import run_contenders
from flcompress.frontend.loading import load_recipe
from flcompress.models import network
from flcompress.models.families.wan import Wan
from flcompress.models.loading import load_transformer
from flcompress.models.parts import open_parts
from flcompress.progress import QuietDisplay
from flcompress.runtime import torch_session
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.generate import _denoiser, denoise, generate
from tests.families.exports import PROMPT, first_frame, other_boundary
from tests.families.pipelines import EXPERTS
from tests.families.test_apply import RECIPE, encoded
from tests.fixtures.rounding import require_rounded
from tests.training.comparing import FORWARD

pytestmark = pytest.mark.e2e

DATA = "data: {moving-digits: {clips: 8}}"
HIGH, LOW = (3, 4), (5, 6)
"""Blocks of the tiny high-noise and low-noise expert: pruned, and whole."""


class Watched(Wan):
    """Remembers the blocks and the timesteps of every call."""

    seen: list[tuple[int, float]]

    def arguments(
        self, config: Mapping[str, Any], x: torch.Tensor, timestep: torch.Tensor, given: Any, guidance: float | None
    ) -> dict[str, Any]:
        self.seen += [(config["num_layers"], float(one)) for one in timestep]
        return super().arguments(config, x, timestep, given, guidance)


Made = tuple[Path, set[tuple[int, float]]]
"""A run directory, and the (blocks, timestep) of every call of a network that its passes made."""


@pytest.fixture(scope="module", params=EXPERTS)
def made(
    request: pytest.FixtureRequest, pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Expert], Made]:
    """Applies the recipe for an expert, once."""
    name = request.param
    home, tiny, folder = tmp_path_factory.mktemp(name), EXPERTS[name], pipeline_folder(name)
    data = encoded(folder, tiny.size, home)

    @cache
    def make(expert: Expert) -> Made:
        recipe, partner = home / f"{expert}.yaml", home / "high" / "exports" / "diffusers"
        recipe.write_text(RECIPE.format(model=folder, data=data, size=tiny.size, guidance=tiny.guidance))
        chosen = [f"model.expert={expert}", "sampling.guidance_scale_2=2.0"]
        chosen += [f"model.partner={partner}"] if expert == "low" else []
        # Samples for the health of a training are of the pair; without them every call is training's own.
        chosen += ["training.health.samples=0"] if name == "wan-a14b" else []
        with pytest.MonkeyPatch.context() as patch:
            family = Watched()
            family.seen = []
            patch.setattr(network, "family_of", lambda name: family)
            apply(recipe, home / expert, display=QuietDisplay(), device="cpu", overrides=chosen)
        return home / expert, set(family.seen)

    return make


@pytest.fixture(scope="module")
def high(made: Callable[[Expert], Made]) -> Made:
    """The recipe for the high-noise expert."""
    return made("high")


@pytest.fixture(scope="module")
def runs(made: Callable[[Expert], Made], high: Made) -> dict[Expert, Made]:
    """That one and the recipe for the low-noise expert, beside the other's student."""
    return {"high": high, "low": made("low")}


def test_the_first_expert_goes_all_the_way(high: Made) -> None:
    """Its partner is still the teacher's, and guided."""
    program = RunDirectory(high[0]).final()
    assert (len(program.graph.blocks), program.contract.own_steps) == (HIGH[0], (0, 1))
    assert program.contract.evaluations == 2 + 2 * 2


def test_the_second_expert_goes_all_the_way(runs: dict[Expert, Made]) -> None:
    first, program = (RunDirectory(runs[expert][0]).final() for expert in ("high", "low"))
    assert (len(program.graph.blocks), program.contract.own_steps) == (LOW[0], (2, 3))
    assert program.contract.evaluations == 4
    assert program.contract.sigmas == first.contract.sigmas


def test_an_expert_is_trained_in_its_own_noise_levels_alone(
    runs: dict[Expert, Made],
) -> None:
    (high_run, high), (_, low) = runs["high"], runs["low"]
    if RunDirectory(high_run).recipe().training.health.samples:
        pytest.skip("samples call both")
    contract = RunDirectory(high_run).final().contract
    assert contract.experts is not None
    boundary = contract.experts.boundary
    assert {blocks for blocks, _ in high} == set(HIGH)
    assert min(timestep for _, timestep in high) >= boundary
    assert {blocks for blocks, _ in low} >= set(LOW)
    assert max(timestep for blocks, timestep in low if blocks in LOW) < boundary
    # The partner only simulates the student's earlier steps: both of them, pruned as it is.
    assert {(blocks, timestep) for blocks, timestep in low if blocks not in LOW} == {
        (HIGH[0], timestep) for timestep in contract.timesteps[:2]
    }


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_stock_call_makes_the_latents_that_the_runtime_makes(runs: dict[Expert, Made], expert: Expert) -> None:
    import diffusers

    run = runs[expert][0]
    folder = run / "exports" / "diffusers"
    facts = FactsFile.read(folder / "flcompress.json")
    pipeline = getattr(diffusers, facts.pipeline_class).from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    given, first = first_frame(folder, facts)
    torch.manual_seed(5)
    stock = pipeline(prompt=PROMPT, **given, **facts.call, output_type="latent").frames
    ours = denoise(_denoiser(run, choose_backend("torch"), facts), open_parts(folder), facts, PROMPT, 5, first)
    swapped = other_boundary(facts, 2)
    other = denoise(_denoiser(run, choose_backend("torch"), swapped), open_parts(folder), swapped, PROMPT, 5, first)
    evaluations = SamplingContract.from_dict(facts.contract.dump()).evaluations
    require_rounded(ours, stock, evaluations * FORWARD, planted=other)


def test_one_expert_is_in_memory_at_a_time_and_no_text_encoder_beside_it(
    runs: dict[Expert, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs["low"][0]
    facts = FactsFile.read(run / "exports" / "diffusers" / "flcompress.json")
    parts = open_parts(run / "exports" / "diffusers")
    loaded: list[weakref.ref[Any]] = []

    def loading(*given: Any) -> Any:
        gc.collect()
        assert [one() for one in loaded] == [None] * len(loaded), "the other expert is still there"
        assert not {"_pipeline", "vae"} & set(vars(parts)), "the text encoder is still there"
        made = load_transformer(*given)
        loaded.append(weakref.ref(made))
        return made

    monkeypatch.setattr(torch_session, "load_transformer", loading)
    _, first = first_frame(run / "exports" / "diffusers", facts)
    latents = denoise(_denoiser(run, choose_backend("torch"), facts), parts, facts, PROMPT, 5, first)
    assert bool(latents.isfinite().all())
    assert len(loaded) == 2, "each comes once a clip"
    gc.collect()
    assert [one() for one in loaded] == [None, None], "the autoencoder comes beside a transformer"


def test_the_exported_pair_generates_by_onnx(runs: dict[Expert, Made], tmp_path: Path) -> None:
    from PIL import Image

    run = runs["low"][0]
    export(RunDirectory(run), ["onnx"], display=QuietDisplay())
    folder = run / "exports" / "diffusers"
    facts = FactsFile.read(folder / "flcompress.json")
    first = first_frame(folder, facts)[1]
    parts = open_parts(folder)
    by_torch, by_onnx = (
        denoise(_denoiser(run, choose_backend(backend), facts), parts, facts, PROMPT, 5, first)
        for backend in ("torch", "onnx")
    )
    swapped = other_boundary(facts, 2)
    other = denoise(_denoiser(run, choose_backend("torch"), swapped), parts, swapped, PROMPT, 5, first)
    evaluations = SamplingContract.from_dict(facts.contract.dump()).evaluations
    require_rounded(by_onnx, by_torch, evaluations * FORWARD, planted=other)
    manifests = [
        json.loads((run / "exports" / "onnx" / part / "manifest.json").read_text()) for part in ("", "partner")
    ]
    assert [len(manifest["kept"]) for manifest in manifests] == [LOW[0], HIGH[0]]
    if find_spec("tensorrt_rtx"):
        export(RunDirectory(run), ["tensorrt"], display=QuietDisplay())
        engines = [run / "exports" / "tensorrt" / part for part in ("", "partner")]
        assert all((engine / "model.engine").stat().st_size > 0 for engine in engines)
        source = json.loads((engines[1] / "manifest.json").read_text())["source"]["file"]
        assert (engines[1] / source).resolve() == run / "exports" / "onnx" / "partner" / "model.onnx"
    image = None
    if parts.from_image:
        image = tmp_path / "first.png"
        Image.new("RGB", (32, 32), (90, 10, 200)).save(image)
    assert generate(run, PROMPT, "onnx", tmp_path / "clip.gif", image=image).stat().st_size > 0


def test_a_partner_that_does_not_fit_is_one_line(runs: dict[Expert, Made], tmp_path: Path) -> None:
    high, low = (RunDirectory(runs[expert][0]) for expert in ("high", "low"))
    made, other = (run.path / "exports" / "diffusers" for run in (high, low))

    def refused(*overrides: str, passes: str = "[]", model: Path | None = None) -> str:
        recipe = tmp_path / "recipe.yaml"
        folder = model or low.recipe().model_folder()
        recipe.write_text(f"version: 1\nmodel: {{path: {folder}, expert: low}}\npasses: {passes}\n{DATA}\n")
        with pytest.raises(RequestError) as caught:
            check(load_recipe(recipe, overrides), RunDirectory(tmp_path / "run"))
        return str(caught.value).partition(f"{recipe}:2: ")[2] or str(caught.value)

    few = "[{dmd: {student_steps: 8, steps: 1}}]"
    assert refused(f"model.partner={made}") == (
        "model.partner: made for 4 steps, but no pass of this recipe gives few steps; expected a dmd pass with "
        "student_steps: 4"
    )
    assert refused(f"model.partner={made}", passes=few) == (
        "model.partner: made for 4 steps, but this recipe's student takes 8; expected a dmd pass with student_steps: 4"
    )
    assert refused(f"model.partner={other}") == (
        f"model.partner: {other} is a pipeline compressed at its low-noise expert, expected at the high-noise one"
    )
    assert refused(model=made) == (
        f"model.path: {made} is the few-step result of another recipe; give the model that one started from, and this "
        "folder as model.partner"
    )
    moved = Path(shutil.copytree(low.recipe().model_folder(), tmp_path / "moved"))
    scheduler = moved / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "flow_shift": 9.0, "shift": 9.0}))
    assert "a student of this model at [1, 0.9641, 0.8996, 0.75]; expected an export of the same model" in refused(
        f"model.partner={made}", model=moved
    )


def test_a_model_of_two_experts_that_moved_is_found_again(runs: dict[Expert, Made], tmp_path: Path) -> None:
    """Each component where it belongs: the partner is not the model's own."""
    run = RunDirectory(runs["low"][0])
    recipe = run.recipe()
    moved = Path(shutil.copytree(recipe.model_folder(), tmp_path / "moved"))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": moved})})
    found = components_of(recipe, model_index(recipe), moved)
    assert found["transformer"] == found["original"] == moved / "transformer_2"
    assert found["original_partner"] == moved / "transformer"
    assert found["partner"] == run.start().components["partner"] == runs["high"][0] / "exports/diffusers/transformer"


def test_an_evaluation_gives_the_teacher_its_own_partner(
    runs: dict[Expert, Made],
) -> None:
    """The student's is the few-step expert of the other recipe."""
    run = RunDirectory(runs["low"][0])
    program, x = run.final(), torch.randn(1, 16, 3, 4, 4)
    config = json.loads((program.components["transformer"] / "config.json").read_text())
    given = Wan().example_conditioning(config, 1, (3, 4, 4), 16, torch.Generator().manual_seed(0))
    found = {one.name: one for one in run_contenders(run)}
    assert {"teacher-5", "teacher-4", "raw-pruned", "student"} <= set(found)
    for name, high, low in (
        ("teacher-5", "original_partner", "original"),
        ("student", "partner", "transformer"),
        ("stochastic-depth-full", "original_partner", "elastic"),
    ):
        for timestep, component in ((950.0, high), (300.0, low)):
            t = torch.tensor([timestep])
            with torch.no_grad():
                expected = network.as_network(load_transformer(program.components[component]))(x, t, given)
                torch.testing.assert_close(found[name].network(x, t, given), expected, rtol=0.0, atol=0.0)


def test_a_bench_times_the_student_beside_its_partner(runs: dict[Expert, Made]) -> None:
    """The teacher next to its own partner; each at the steps that it answers."""
    run = RunDirectory(runs["low"][0])
    results, teacher = bench(run, 1, backends=["torch"]), run.final().teacher_contract
    student = results["student"]
    assert (student["evaluations"], student["own_evaluations"], student["partner"]["evaluations"]) == (4, 2, 2)
    assert results["teacher"]["evaluations"] == teacher.evaluations
    assert results["teacher"]["own_evaluations"] == teacher.own_evaluations
    sizes = {
        name: sum(one.numel() for one in load_transformer(run.final().components[name]).parameters())
        for name in ("original", "transformer", "partner", "original_partner")
    }
    assert (student["parameters"], student["partner"]["parameters"]) == (sizes["transformer"], sizes["partner"])
    assert results["teacher"]["partner"]["parameters"] == sizes["original_partner"] > sizes["partner"]
