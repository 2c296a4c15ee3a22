"""`--frame-local` of `generate` and `eval`: a run's result, some of whose blocks attend within latent frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from flcompress.cli import main
from flcompress.core.program import Fact, Program
from flcompress.diffusion.student import student_contract
from flcompress.driver.manager import export
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source, starting_program
from flcompress.driver.store import Store
from flcompress.evaluation.contenders import run_contenders
from flcompress.frontend.loading import load_recipe
from flcompress.ir.block import Estimate
from flcompress.ir.selection import choose
from flcompress.models.loading import load_transformer
from flcompress.progress import QuietDisplay
from flcompress.tracing.boundaries import clip_blocks
from flcompress.tracing.self_attention import frame_local_network
from tests.families.exports import RECIPE
from tests.families.pipelines import EXPORTED
from tests.families.test_bench import make_run as unscored

pytestmark = pytest.mark.e2e

PROMPT = "a three drifting up"


def make_run(model: Path, name: str, folder: Path, *, few: bool = False) -> RunDirectory:
    """A finished run of a tiny pipeline whose later blocks attend less to other frames; `few`: sampled in two steps."""
    tiny, path = EXPORTED[name], folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, guidance=tiny.guidance, tokens=16, size=tiny.size))
    recipe = load_recipe(path)
    run = RunDirectory(folder / "run")
    run.begin(recipe)

    def scored(work: Path) -> Program:
        program = starting_program(recipe, read_source(recipe), work)
        scores = {
            block: Estimate(mean=1.0 / (1.0 + number), standard_error=0.01)
            for number, block in enumerate(clip_blocks(program.family, program.graph))
        }
        graph, facts = program.graph.with_temporal_attention(scores), program.facts | {Fact.ATTENTION_SCORED}
        contract = student_contract(program.teacher_contract, 2, program.family.sigmas) if few else program.contract
        return replace(program, graph=graph, facts=facts, contract=contract)

    store = Store(run.path / "passes")
    start = store.make(0, "model", "0" * 64, {}, lambda work: starting_program(recipe, read_source(recipe), work))
    run.record_entries([start, store.make(1, "temporal-attention", "1" * 64, {}, scored)], finished=True)
    return run


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words), "--quiet"])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox"])
def test_a_family_samples(pipeline_folder: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    """The command's clip is another one, and its contender computes as the chosen blocks of the run's result do."""
    run = make_run(pipeline_folder(name), name, tmp_path)
    export(run, ["diffusers"], display=QuietDisplay())
    plain, local = tmp_path / "plain.png", tmp_path / "local.png"
    for out, options in ((plain, ()), (local, ("--frame-local", 0.3))):
        done = call("generate", run.path, "--prompt", PROMPT, "--out", out, *options)
        assert done.exit_code == 0, done.output
    assert pixels(plain).shape == pixels(local).shape
    assert not np.array_equal(pixels(plain), pixels(local))

    program = run.final()
    chosen = choose(program.graph, 0.3, "temporal-attention")
    teacher, *_, contender = run_contenders(run, frame_local=0.3)
    assert contender.name == "frame-local-0.3"
    assert contender.label == f"{teacher.label}, {len(chosen)} of {len(program.graph.blocks)} blocks frame-local"
    assert contender.contract == teacher.contract
    assert contender.identity != teacher.identity
    model = load_transformer(program.components["transformer"])
    draw = torch.Generator().manual_seed(0)
    conditioning = program.family.example_conditioning(model.config, 1, program.latents[1:], 16, draw)
    x, timestep = torch.randn(1, *program.latents, generator=draw), torch.tensor([500.0])
    expected = frame_local_network(model, chosen, program.contract.embedded_guidance)(x, timestep, conditioning)
    assert torch.equal(contender.network(x, timestep, conditioning), expected)
    assert not torch.equal(teacher.network(x, timestep, conditioning), expected)


@pytest.fixture(scope="module")
def student(pipeline_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a student of two steps, and its export."""
    run = make_run(pipeline_folder("wan"), "wan", tmp_path_factory.mktemp("student"), few=True)
    export(run, ["diffusers"], display=QuietDisplay())
    return run.path


def test_it_is_judged_next_to_the_student(student: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a three\na four\n")
    size = ("--prompts", prompts, "--seeds", 2, "--clips-per-prompt", 1, "--json")
    done = call("eval", student, *size, "--frame-local", 0.3)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["contenders"]
    assert [row["name"] for row in rows] == ["teacher-4", "student", "frame-local-0.3"]
    assert rows[2]["label"] == "student, 2 steps, 2 of 4 blocks frame-local"
    assert [row[key] for row in rows[1:] for key in ("evaluations", "parameters")] == 2 * [2, rows[1]["parameters"]]
    assert rows[2]["teacher_psnr"]["values"] != rows[1]["teacher_psnr"]["values"]


def test_a_folder_holds_the_clips_of_one_share(student: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
    prompts.write_text("a three\n")
    given = ("generate", student, "--prompts", prompts, "--out", out)
    assert call(*given, "--frame-local", 0.3).exit_code == 0
    (clip,) = out.glob("*.mp4")
    before = clip.read_bytes()
    for options, asked in (((), None), (("--frame-local", 0.4), 0.4)):
        done = call(*given, *options)
        assert done.exit_code == 2
        assert f"{out}: holds clips of another frame local: 0.3 there, {asked} given; choose another" in done.stderr
    assert clip.read_bytes() == before
    assert call(*given[:-1], tmp_path / "others").exit_code == 0
    assert (tmp_path / "others" / clip.name).read_bytes() != before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("generate", "--prompt", PROMPT, "--frame-local", "1.5"),
         "--frame-local: 1.5 given, expected a share of the parameters between 0 and 1, such as 0.3"),
        (("generate", "--prompt", PROMPT, "--frame-local", "0.3", "--backend", "onnx"),
         "--frame-local: 0.3 given with --backend onnx, expected torch, the only one that computes attention so: no "
         "export holds it"),
        (("eval", "--suite", "proxies", "--frame-local", "0"),
         "--frame-local: 0 given, expected a share of the parameters between 0 and 1, such as 0.3"),
        (("eval", "--suite", "proxies", "--frame-local", "0.99"),
         "--frame-local: 0.99 given, but the measured blocks of RUN do not hold as much of the parameters with one to "
         "spare; give less"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(student: Path, tmp_path: Path, command: tuple[str, ...], message: str) -> None:
    (name, *options), out = command, tmp_path / "clip.gif"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a three\n")
    done = call(name, student, *options, *(("--out", out) if name == "generate" else ("--prompts", prompts)))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.strip().endswith(message.replace("RUN", str(student)))
    assert not out.exists()


def test_a_run_without_scores(pipeline_folder: Callable[[str], Path], tmp_path: Path) -> None:
    run = unscored(pipeline_folder("wan"), "wan", tmp_path)
    export(run, ["diffusers"], display=QuietDisplay())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a three\n")
    for words in (("generate", run.path, "--prompt", PROMPT), ("eval", run.path, "--prompts", prompts)):
        done = call(*words, "--frame-local", 0.3)
        assert done.exit_code == 2
        assert done.stderr.strip() == (
            f"error: --frame-local: 0.3 given, but {run.path} has not measured which blocks attend least to other "
            "frames; put the temporal-attention pass into its recipe"
        )


def test_an_export_of_before_is_refused(student: Path, tmp_path: Path) -> None:
    facts = student / "exports" / "diffusers" / "flcompress.json"
    before = facts.read_text()
    facts.write_text(json.dumps({**json.loads(before), "kept": {}}))
    done = call("generate", student, "--prompt", PROMPT, "--out", tmp_path / "clip.gif", "--frame-local", 0.3)
    facts.write_text(before)
    assert done.exit_code == 2
    assert "an export of an earlier student; make it again with: flcompress export" in done.stderr
