"""`sampling.negative_prompt`, from the recipe through the dataset into the contract."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from flcompress.cli import main
from flcompress.data.dataset import LatentDataset
from flcompress.data.index import Index
from flcompress.driver.manager import check
from flcompress.driver.rundir import RunDirectory
from flcompress.driver.start import read_source, start_key
from flcompress.errors import DataError, RecipeError
from flcompress.frontend.loading import load_recipe
from flcompress.models.parts import open_parts
from tests.fixtures.encode_command import encode
from tests.fixtures.recipes import WriteRecipe

TEXT = "a one, slow"


@pytest.fixture(scope="module")
def against(model: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose guidance leads away from TEXT."""
    out = tmp_path_factory.mktemp("against") / "out"
    assert encode(model, videos, out, "--negative-prompt", TEXT, "--quiet").exit_code == 0
    return out


def conditioning(model: Path, text: str) -> torch.Tensor:
    return open_parts(model).encode_prompts([text], 16)["encoder_hidden_states"]


def test_a_dataset_holds_it_beside_the_empty_prompt(
    against: Path, encoded: tuple[Path, dict[str, Any]], model: Path
) -> None:
    index, usual = Index.read(against), Index.read(encoded[0])
    assert index.request == {**usual.request, "negative_prompt": TEXT}
    assert index.prompts == ("", TEXT, *usual.prompts[1:])
    data, before = LatentDataset.load(against), LatentDataset.load(encoded[0])
    torch.testing.assert_close(data.negative["encoder_hidden_states"], conditioning(model, TEXT))
    torch.testing.assert_close(data.empty["encoder_hidden_states"], conditioning(model, ""))
    assert torch.equal(before.negative["encoder_hidden_states"], before.empty["encoder_hidden_states"])
    for ours, theirs in zip(*(one.batch(8, torch.Generator().manual_seed(0)) for one in (data, before)), strict=True):
        given = (ours, theirs) if isinstance(ours, dict) else ({"": ours}, {"": theirs})
        assert all(torch.equal(given[0][name], given[1][name]) for name in given[1])  # the same clips and captions


def test_it_is_no_prompt_to_train_on(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a one\na two\n")
    given = ["--pipeline", model, "--captions", tmp_path / "prompts.txt", "--max-sequence-length", 16, "--quiet"]
    command = ["encode", *map(str, given), "--out", str(tmp_path / "out"), "--negative-prompt"]
    done = CliRunner().invoke(main, [*command, TEXT])
    assert done.exit_code == 0, done.output
    assert "2 prompts" in done.stdout
    data = LatentDataset.load(tmp_path / "out")
    _, drawn = data.conditions(64, torch.Generator().manual_seed(0), (4, 1, 2, 2))
    rows = {tuple(row.flatten().tolist()) for row in drawn["encoder_hidden_states"]}
    assert len(rows) == 2
    assert tuple(data.negative["encoder_hidden_states"].flatten().tolist()) not in rows
    refused = CliRunner().invoke(main, [*command[:-3], "--out", str(tmp_path / "b"), "--negative-prompt", "a two"])
    assert refused.exit_code == 2
    assert "the negative prompt is one of the prompts ('a two')" in refused.stderr


@pytest.mark.parametrize("more", [(), ("--negative-prompt", "another")])
def test_a_dataset_of_another_one_is_left_alone(
    against: Path, model: Path, videos: Path, more: tuple[str, ...]
) -> None:
    done = encode(model, videos, against, *more)
    assert done.exit_code == 2
    assert f"negative_prompt: {TEXT} there, {more[1] if more else None} given" in done.stderr


@pytest.mark.parametrize("theirs", ["", TEXT])
def test_a_recipe_and_its_dataset_agree(
    write: WriteRecipe, against: Path, encoded: tuple[Path, dict[str, Any]], theirs: str, tmp_path: Path
) -> None:
    folder = against if theirs else encoded[0]
    path = write(f"data: {{latents: {folder}}}\npasses: []\n")
    ours = "" if theirs else TEXT
    wrong = load_recipe(path, [f"sampling.negative_prompt={json.dumps(ours)}"])
    with pytest.raises(
        DataError, match=f"its negative prompt is '{theirs}', expected sampling.negative_prompt, '{ours}'"
    ):
        check(wrong, RunDirectory(tmp_path / "run"))
    check(load_recipe(path, [f"sampling.negative_prompt={json.dumps(theirs)}"]), RunDirectory(tmp_path / "run"))


def test_it_is_part_of_the_contract_and_of_the_key(write: WriteRecipe) -> None:
    path = write("passes: []\n")
    without, with_it = (load_recipe(path, more) for more in ((), [f"sampling.negative_prompt={TEXT}"]))
    assert read_source(with_it).contract.negative_prompt == TEXT
    assert "negative_prompt" not in read_source(without).contract.to_dict()
    assert start_key(without) != start_key(with_it)
    assert "negative_prompt" not in without.sampling.decisive


def test_it_is_refused_where_nothing_guides(write: WriteRecipe, tmp_path: Path) -> None:
    path = write("passes: []\n")
    given = ["sampling.guidance_scale=1", f"sampling.negative_prompt={TEXT}"]
    with pytest.raises(
        RecipeError, match=r"sampling\.negative_prompt: given, but neither the model \(guidance_scale 1\)"
    ):
        check(load_recipe(path, given), RunDirectory(tmp_path / "run"))
