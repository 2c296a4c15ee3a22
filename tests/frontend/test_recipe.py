from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.core.settings import Training
from flcompress.errors import DataError, FlcompressError, ModelError, PreconditionError, RecipeError
from flcompress.frontend.loading import dump_recipe, load_recipe
from tests.fixtures.fakes import Cut, Score, Text
from tests.fixtures.recipes import WriteRecipe

pytestmark = pytest.mark.usefixtures("fake_steps")

GOOD = """\
version: 1
model: teacher
passes:
  - score: {draws: 4, rate: 1e-5}
  - cut: {keep: 0.7}
exports:
  - text
"""


def load(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FlcompressError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_status == 2
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_recipe_becomes_its_passes(tmp_path: Path) -> None:
    path = tmp_path / "some-name.yaml"
    path.write_text(GOOD, encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.name == "some-name"
    assert recipe.passes == (Score(draws=4, rate=1e-5), Cut(keep=0.7))
    assert recipe.exports == (Text(),)
    assert recipe.seed == 0
    assert recipe.sampling.num_inference_steps == 50


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "data: {moving-digits: {clips: 7}}\n", encoding="utf-8")
    recipe = load_recipe(path)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again.to_dict() == recipe.to_dict()
    assert again.passes == recipe.passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("draws: 4", "drawz: 4"), "x.yaml:4: passes[0].score.drawz: unknown key; did you mean 'draws'?"),
        (("seed: 0", "sed: 0"), "x.yaml:8: sed: unknown key; did you mean 'seed'?"),
        (("version: 1", "versoin: 1"), "x.yaml:1: versoin: unknown key; did you mean 'version'?"),
        (("seed: 0", "file: x"), "x.yaml:8: file: unknown key; known: data, evaluation, exports, model, name, passes, "
         "sampling, seed, training, version"),
        (("version: 1\n", ""), "x.yaml: version: missing, expected 1"),
        (("version: 1", "version: 2"), "x.yaml:1: version: 2 given, expected 1"),
        (("model: teacher\n", ""),
         "x.yaml: model: missing, expected a mapping with path, pipeline, expert, partner, weights"),
        (("teacher", "{path: t, weights: some}"),
         "x.yaml:2: model.weights: some given, expected one of trained, random; the default is trained"),
        (("keep: 0.7", ""), "x.yaml:5: passes[1].cut.keep: missing, expected a number above 0 and of at most 1"),
        (("keep: 0.7", "keep: 0"),
         "x.yaml:5: passes[1].cut.keep: 0 given, expected a number above 0 and of at most 1"),
        (("draws: 4", "probability: 1.5"),
         "x.yaml:4: passes[0].score.probability: 1.5 given, expected a number between 0 and 1; the default is 0.5"),
        (("draws: 4", "draws: 0"),
         "x.yaml:4: passes[0].score.draws: 0 given, expected a whole number of at least 1; the default is 8"),
        (("draws: 4", "draws: 4.5"),
         "x.yaml:4: passes[0].score.draws: 4.5 given, expected a whole number of at least 1; the default is 8"),
        (("draws: 4", "draws: '4'"),
         "x.yaml:4: passes[0].score.draws: 4 given, expected a whole number of at least 1; the default is 8"),
        (("draws: 4", "draws: true"),
         "x.yaml:4: passes[0].score.draws: true given, expected a whole number of at least 1; the default is 8"),
        (("rate: 1e-5", "rate: -1e-5"),
         "x.yaml:4: passes[0].score.rate: -1e-05 given, expected a number above 0; the default is 0.0001"),
        (("draws: 4", "share: 1"),
         "x.yaml:4: passes[0].score.share: 1 given, expected a number above 0 and below 1; the default is 0.3"),
        (("draws: 4", "kind: two"),
         "x.yaml:4: passes[0].score.kind: two given, expected one of one, other; the default is one"),
        (("draws: 4", "span: [1, a]"),
         "x.yaml:4: passes[0].score.span: [1, a] given, expected a list of 2: [a number, a number]; "
         "the default is [0, 1]"),
        (("draws: 4", "span: [1]"),
         "x.yaml:4: passes[0].score.span: [1] given, expected a list of 2: [a number, a number]; "
         "the default is [0, 1]"),
        (("- cut", "- cutt"), "x.yaml:5: passes[1]: no pass 'cutt'; did you mean 'cut'?"),
        (("- cut", "- zzzz"), "x.yaml:5: passes[1]: no pass 'zzzz'; known: broken, cut, reader, score, slow"),
        (("- text", "- txt: {}"), "x.yaml:7: exports[0]: no exporter 'txt'; did you mean 'text'?"),
        (("{keep: 0.7}", "0.7"),
         "x.yaml:5: passes[1].cut: 0.7 given, expected a mapping of arguments (see flcompress passes cut)"),
        (("  - cut", "    cut"),
         "x.yaml:4: passes[0]: {score: {draws: 4, rate: 1e-05}, cut: {keep: 0.7}} given, expected one name with its "
         "arguments; start every step with its own '- '"),
        (("passes:", "passes: all\nother:"),
         "x.yaml:3: passes: all given, expected a list such as - prune: {remove: 0.3}"),
        (("seed: 0", "seed: -1"),
         "x.yaml:8: seed: -1 given, expected a whole number of at least 0 and below 2147483648; the default is 0"),
        (("seed: 0", "name: A b"),
         "x.yaml:8: name: A b given, expected lower-case letters, digits and hyphens; set name: in the recipe"),
        (("seed: 0", "data: {}"), "x.yaml:8: data: nothing given, expected one of moving-digits, latents, videos"),
        (("seed: 0", "data: {moving-digits: {clips: 0}}"),
         "x.yaml:8: data.moving-digits.clips: 0 given, expected a whole number above 0"),
        (("seed: 0", "data: {moving-digit: {clips: 3}}"),
         "x.yaml:8: data.moving-digit: unknown key; did you mean 'moving-digits'?"),
        (("seed: 0", "sampling: {guidance_convention: other}"),
         "x.yaml:8: sampling.guidance_convention: other given, expected one of unconditional, conditional; "
         "the default is unconditional"),
        (("seed: 0", "training: {micro_batch: 0}"),
         "x.yaml:8: training.micro_batch: 0 given, expected a whole number of at least 1 or null; "
         "the default is null"),
        (("seed: 0", "sampling: 3"),
         "x.yaml:8: sampling: 3 given, expected a mapping with num_inference_steps, guidance_scale, "
         "guidance_convention, guidance_scale_2, negative_prompt, max_sequence_length, embedded_guidance, num_frames, "
         "height, width; the default is "
         "{num_inference_steps: 50, guidance_scale: 4, "
         "guidance_convention: unconditional, negative_prompt: '', max_sequence_length: 512}"),
    ],
)  # fmt: skip
def test_faults_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    text = GOOD + "seed: 0\n"
    assert change[0] in text
    assert load(tmp_path, text.replace(*change, 1)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: null given, expected a mapping with version, model and passes"),
        ("- 1\n", "x.yaml: [1] given, expected a mapping with version, model and passes"),
    ],
)
def test_no_recipe_at_all(tmp_path: Path, text: str, message: str) -> None:
    assert load(tmp_path, text) == message


def test_a_missing_recipe_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("  - cut: {keep: 0.5}\n  - score\n",
         "x.yaml:4: passes[0].cut: needs the program to be scored; it is trained; put score before it"),
        ("  - reader\n",
         "x.yaml:4: passes[0].reader: reads clips, but the recipe has no data:; add one, such as "
         "data: {moving-digits: {clips: 2048}}"),
    ],
)  # fmt: skip
def test_needs_are_checked_before_any_work(tmp_path: Path, passes: str, message: str) -> None:
    assert load(tmp_path, f"version: 1\nmodel: t\npasses:\n{passes}") == message


def test_how_a_training_is_shared_is_no_part_of_its_result() -> None:
    shared = Training(engine="zero2", processes=4, micro_batch=2)
    assert shared.decisive == Training().decisive
    assert Training(precision="bf16").decisive != Training().decisive


def test_random_weights_are_not_trained(tmp_path: Path) -> None:
    text = "version: 1\nmodel: {path: t, weights: random}\npasses:\n  - cut: {keep: 0.5}\n"
    assert "it is not; put score" in load(tmp_path, text)


@pytest.mark.parametrize(
    ("exports", "message"),
    [
        ("[copy, text]", "x.yaml:3: exports[0].copy: reads what text writes; put text before it"),
        ("[text, text]", "x.yaml:3: exports[1].text: given twice, expected once; remove one"),
    ],
)
def test_exports_in_order(tmp_path: Path, exports: str, message: str) -> None:
    assert load(tmp_path, f"version: 1\nmodel: t\nexports: {exports}\n") == message


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD, encoding="utf-8")
    given = [
        "seed=3",
        "passes.score.draws=9",
        "passes[1].keep=0.5",
        "passes.0.score.rate=1e-6",
        "exports.text.words=bye",
        "sampling.guidance_scale=2",
        "model.weights=trained",
        "data={moving-digits: {clips: 5}}",
    ]
    recipe = load_recipe(path, given)
    assert recipe.seed == 3
    assert recipe.passes == (Score(draws=9, rate=1e-6), Cut(keep=0.5))
    assert recipe.exports == (Text(words="bye"),)
    assert recipe.sampling.guidance_scale == 2.0
    assert recipe.data_spec() == {"moving-digits": {"clips": 5}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seed", "--set seed: expected key.path=value, such as passes.dmd.steps=10"),
        ("seed=x", "--set seed=x: seed: x given, expected a whole number of at least 0 and below 2147483648; "
         "the default is 0"),
        ("sed=1", "--set sed=1: sed: unknown key; did you mean 'seed'?"),
        ("passes.dmd.steps=1", "--set passes.dmd.steps=1: no step is named 'dmd' in passes; the recipe has score, cut"),
        ("passes[7].steps=1", "--set passes[7].steps=1: no passes[7]; the recipe has 2, counted from 0"),
        ("passes=[]", "--set passes=[]: passes cannot be set as a whole; set an argument, as passes.dmd.steps=10"),
        ("passes.cut=1", "--set passes.cut=1: expected one argument of cut, such as passes.cut.x=1"),
        ("passes.cut.kep=1", "--set passes.cut.kep=1: passes[1].cut.kep: unknown key; did you mean 'keep'?"),
        ("passes.cut.keep=3", "--set passes.cut.keep=3: passes[1].cut.keep: 3 given, expected a number above 0 and "
         "of at most 1"),
        ("version.x=1", "--set version.x=1: version holds 1, not a mapping; set version itself"),
        ("seed=[", "--set seed=[: cannot be read as YAML: expected the node content, but found '<stream end>'"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be(tmp_path: Path, given: str, message: str) -> None:
    assert load(tmp_path, GOOD, given) == message


def test_two_steps_of_one_name_are_told_apart_by_place(tmp_path: Path) -> None:
    text = GOOD.replace("exports:\n  - text\n", "  - score\n")
    assert load(tmp_path, text, "passes.score.draws=1") == (
        "--set passes.score.draws=1: 2 steps are named 'score' in passes; name it by index, as passes[0]"
    )


def test_model_folder_beside_the_recipe_or_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    path = tmp_path / "recipes" / "x.yaml"
    path.write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    recipe = load_recipe(path)
    with pytest.raises(ModelError) as caught:
        recipe.model_folder()
    assert str(caught.value) == (
        f"{path}:2: model: no folder {tmp_path}/recipes/teacher nor {tmp_path}/here/teacher; "
        "give the path of a diffusers pipeline folder"
    )
    (tmp_path / "here" / "teacher").mkdir()
    assert recipe.model_folder() == tmp_path / "here" / "teacher"
    (tmp_path / "recipes" / "teacher").mkdir()
    assert recipe.model_folder() == tmp_path / "recipes" / "teacher"


def test_data_that_is_not_there(tmp_path: Path, write: WriteRecipe) -> None:
    recipe = load_recipe(write("data: {latents: none}\n"))
    with pytest.raises(DataError, match=r"tiny\.yaml:4: data\.latents: no file or folder .*none"):
        recipe.data_spec()


def test_guidance_is_converted_once(tmp_path: Path, write: WriteRecipe) -> None:
    recipe = load_recipe(write(""), ["sampling.guidance_scale=3.5", "sampling.guidance_convention=conditional"])
    assert recipe.sampling.scale == recipe.sampling.scale_2 == 4.5
    recipe = load_recipe(recipe.file, ["sampling.guidance_scale_2=2", "sampling.guidance_convention=conditional"])
    assert (recipe.sampling.scale, recipe.sampling.scale_2) == (5.0, 3.0)


def test_precondition_error_is_a_precondition_error(write: WriteRecipe) -> None:
    with pytest.raises(PreconditionError):
        load_recipe(write("passes: [{cut: {keep: 0.5}}]\n"))
