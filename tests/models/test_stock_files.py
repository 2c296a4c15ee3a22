"""Which files of a folder are read: those that stock loading reads, and no others are checked, hashed or copied."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flcompress.errors import ModelError
from flcompress.exporters.shared.weights import WeightFiles
from flcompress.models.folder import check_pipeline, only_configurations
from flcompress.models.loading import empty_transformer, load_transformer
from flcompress.models.parts import load_part
from flcompress.models.shards import folder_tensors
from flcompress.models.stock_files import folder_digest, stock_files
from flcompress.runtime.manifest import copy_component
from tests.fixtures.tiny import tiny_pipeline

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
NAMES = {"transformer": DIFFUSERS, "vae": DIFFUSERS, "text_encoder": TRANSFORMERS}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("files") / "model", layers=2)


@pytest.fixture
def pipeline(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def loaded(pipeline: Path, part: str) -> Weights:
    folder = pipeline / part
    if part == "transformer":
        return dict(load_transformer(folder).state_dict())
    kind = json.loads((pipeline / "model_index.json").read_text())[part]
    return dict(load_part(folder, kind).state_dict())


def take(folder: Path) -> Weights:
    """A part's weights, gone from its folder."""
    (path,) = folder.glob("*.safetensors")
    weights: Weights = load_file(str(path))
    path.unlink()
    return weights


def put(path: Path, weights: Weights) -> None:
    save_file(weights, str(path), metadata={"format": "pt"})


def shard(folder: Path, weights: Weights, names: tuple[str, str], index: str) -> None:
    """Write weights as two shards and their index."""
    split = [dict(list(weights.items())[start::2]) for start in range(2)]
    places: dict[str, str] = {}
    for name, part in zip(names, split, strict=True):
        put(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def single(folder: Path, name: str, weights: Weights) -> None:
    put(folder / f"{name}.fp16.safetensors", weights)


def sharded(folder: Path, name: str, weights: Weights) -> None:
    names = f"{name}.fp16-00001-of-00002.safetensors", f"{name}.fp16-00002-of-00002.safetensors"
    shard(folder, weights, names, f"{name}.safetensors.index.fp16.json")


def sharded_as_before(folder: Path, name: str, weights: Weights) -> None:
    names = f"{name}-00001-of-00002.fp16.safetensors", f"{name}-00002-of-00002.fp16.safetensors"
    shard(folder, weights, names, f"{name}.safetensors.index.fp16.json")


@pytest.mark.parametrize("write", [single, sharded, sharded_as_before])
@pytest.mark.parametrize("part", list(NAMES))
def test_a_variant_alone_is_read_and_exported_under_the_plain_names(
    pipeline: Path, tmp_path: Path, part: str, write: Callable[[Path, str, Weights], None]
) -> None:
    folder, name = pipeline / part, NAMES[part]
    half = {key: one.half() for key, one in take(folder).items()}
    write(folder, name, half)
    check_pipeline(pipeline)
    found = loaded(pipeline, part)
    assert all(torch.equal(found[key], one.to(found[key].dtype)) for key, one in half.items())
    assert stock_files(folder).variant == "fp16"
    if part == "transformer":
        assert empty_transformer(folder)[1].keys() == half.keys()
        files = WeightFiles(folder)
        assert all(torch.equal(files[key], half[key]) for key in half)
    copy_component(folder, tmp_path / "copy" / part)
    assert stock_files(tmp_path / "copy" / part).variant is None
    assert not [path.name for path in (tmp_path / "copy" / part).iterdir() if "fp16" in path.name]
    shutil.copy(pipeline / "model_index.json", tmp_path / "copy")
    copied = loaded(tmp_path / "copy", part)
    assert all(torch.equal(copied[key], one) for key, one in found.items())


@pytest.mark.parametrize("part", list(NAMES))
def test_leftovers_are_neither_checked_nor_hashed_nor_copied(pipeline: Path, tmp_path: Path, part: str) -> None:
    folder, name = pipeline / part, NAMES[part]
    (path,) = folder.glob("*.safetensors")
    weights = load_file(str(path))
    digests = [folder_digest(folder), folder_digest(pipeline)]
    before, listed = loaded(pipeline, part), sorted(one.name for one in folder.iterdir())
    bad = {key: torch.full_like(one, torch.nan) for key, one in weights.items()}
    put(folder / f"{name}.fp16.safetensors", {key: one.half() for key, one in bad.items()})
    put(folder / f"{name}.bf16.safetensors", {key: one.bfloat16() for key, one in bad.items()})
    put(folder / f"{name}.non_ema.safetensors", bad)
    put(folder / "ema.safetensors", bad)
    (folder / f"{name}.safetensors.index.fp16.json").write_text("{")
    (folder / f"{name}-00001-of-00003.safetensors").write_bytes(b"half a downl")
    for file in (f"._{path.name}", ".DS_Store", "pytorch_model.bin", f"{name}.bin", "flax_model.msgpack", "q4.gguf"):
        (folder / file).write_bytes(b"\0\1")
    (pipeline / ".cache" / "huggingface").mkdir(parents=True)
    (pipeline / ".cache" / "huggingface" / "x.metadata").write_text("yesterday")
    (pipeline / "wan.safetensors").write_bytes(b"the original, in one file")
    check_pipeline(pipeline)
    assert [folder_digest(folder), folder_digest(pipeline)] == digests
    after = loaded(pipeline, part)
    assert all(torch.equal(after[key], one) for key, one in before.items())
    copy_component(folder, tmp_path / "copy")
    assert sorted(one.name for one in (tmp_path / "copy").iterdir()) == listed


@pytest.mark.parametrize("part", list(NAMES))
def test_of_shards_and_a_single_file_the_one_that_stock_loading_reads_is_taken(pipeline: Path, part: str) -> None:
    """diffusers reads shards where there is an index, transformers the single file."""
    folder, name = pipeline / part, NAMES[part]
    old = take(folder)
    new = {key: one + 1 for key, one in old.items()}
    names = f"{name}-00001-of-00002.safetensors", f"{name}-00002-of-00002.safetensors"
    shard(folder, new, names, f"{name}.safetensors.index.json")
    alone = folder_digest(folder)
    put(folder / f"{name}.safetensors", old)
    check_pipeline(pipeline)
    found = loaded(pipeline, part)
    expected = new if name == DIFFUSERS else old
    assert all(torch.equal(found[key], one) for key, one in expected.items())
    assert {tensor.file.name for tensor in folder_tensors(folder).values()} == (
        set(names) if name == DIFFUSERS else {f"{name}.safetensors"}
    )
    assert (folder_digest(folder) == alone) == (name == DIFFUSERS)


def test_a_digest_is_what_it_was_for_a_folder_without_leftovers(tmp_path: Path) -> None:
    """Cached results of earlier releases are still found."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("words")
    expected = "35ab87ffbac0a269e8128d29c313aea87295ac23f1d504ba3b154be15e174059"
    assert folder_digest(tmp_path) == expected


def test_files_are_hashed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits until the other is being hashed too."""
    both = threading.Barrier(2)

    def waiting(path: Path) -> str:
        both.wait(timeout=60)
        return path.name

    monkeypatch.setattr("flcompress.models.stock_files.sha256", waiting)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(name)
    assert folder_digest(tmp_path) == hashlib.sha256(b"a.json\0a.jsonb.json\0b.json").hexdigest()


def rename_index(folder: Path) -> None:
    sharded(folder, DIFFUSERS, take(folder))
    index = folder / f"{DIFFUSERS}.safetensors.index.fp16.json"
    index.rename(folder / f"{DIFFUSERS}.safetensors.fp16.index.json")


def two_variants(folder: Path) -> None:
    weights = take(folder)
    put(folder / f"{DIFFUSERS}.fp16.safetensors", weights)
    put(folder / f"{DIFFUSERS}.bf16.safetensors", weights)


def shards_without_index(folder: Path) -> None:
    put(folder / f"{DIFFUSERS}-00001-of-00001.safetensors", take(folder))


def another_name(folder: Path) -> None:
    put(folder / "ema.safetensors", take(folder))


def gguf(folder: Path) -> None:
    take(folder)
    (folder / "vae-q4.gguf").write_bytes(b"GGUF")


def hidden(folder: Path) -> None:
    put(folder / f"._{DIFFUSERS}.safetensors", take(folder))


def twice(folder: Path) -> None:
    weights = take(folder)
    names = f"{DIFFUSERS}-00001-of-00002.safetensors", f"{DIFFUSERS}-00002-of-00002.safetensors"
    shard(folder, weights, names, f"{DIFFUSERS}.safetensors.index.json")
    put(folder / names[1], weights)


def lost_shard(folder: Path) -> None:
    sharded(folder, DIFFUSERS, take(folder))
    (folder / f"{DIFFUSERS}.fp16-00002-of-00002.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            rename_index,
            "/diffusion_pytorch_model.safetensors.fp16.index.json: an index under its old name; rename it to "
            "diffusion_pytorch_model.safetensors.index.fp16.json",
        ),
        (
            two_variants,
            ": several variants (bf16, fp16) and no diffusion_pytorch_model.safetensors; expected one set of weights: "
            "keep one of diffusion_pytorch_model.bf16.safetensors and diffusion_pytorch_model.fp16.safetensors, or "
            "rename one to diffusion_pytorch_model.safetensors",
        ),
        (
            shards_without_index,
            "/diffusion_pytorch_model-00001-of-00001.safetensors: stock loading does not read a file of this name; "
            "expected diffusion_pytorch_model.safetensors, or shards with diffusion_pytorch_model.safetensors.index"
            ".json",
        ),
        (
            another_name,
            "/ema.safetensors: stock loading does not read a file of this name; expected diffusion_pytorch_model"
            ".safetensors, or shards with diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            gguf,
            "/vae-q4.gguf: quantised weights (GGUF) are not read; expected diffusion_pytorch_model.safetensors",
        ),
        (
            hidden,
            ": no weights; expected diffusion_pytorch_model.safetensors, or shards with diffusion_pytorch_model"
            ".safetensors.index.json",
        ),
        (
            lost_shard,
            "/diffusion_pytorch_model.fp16-00002-of-00002.safetensors: missing; diffusion_pytorch_model.safetensors"
            ".index.fp16.json names it; copy the shard again",
        ),
    ],
)
def test_what_stock_loading_cannot_read_is_named(pipeline: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(pipeline / "vae")
    with pytest.raises(ModelError) as caught:
        check_pipeline(pipeline)
    assert str(caught.value) == f"{pipeline / 'vae'}{message}"


def test_a_tensor_in_two_shards_is_named(pipeline: Path) -> None:
    twice(pipeline / "vae")
    with pytest.raises(
        ModelError, match=r"-00002-of-00002\.safetensors: tensor .* is in .*-00001-of-00002.safet.* too"
    ):
        check_pipeline(pipeline)


def test_hidden_files_make_no_weights(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "._diffusion_pytorch_model.safetensors").write_bytes(b"\0")
    assert only_configurations(tmp_path)
