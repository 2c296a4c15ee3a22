"""Weights copied from file to file, tensor by tensor."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flcompress.errors import ModelError
from flcompress.models.folder import check_weights
from flcompress.models.shards import InterpolatedTensor, StoredTensor, file_tensors, folder_tensors, write_tensors

NAME, INDEX = "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.float8_e4m3fn)


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    alike = one.dtype == two.dtype and one.shape == two.shape
    return alike and torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(st.lists(st.text("abc.é1", min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
    shape = st.lists(st.integers(0, 5), max_size=3)
    made = {}
    for name in names:
        dtype = draw(st.sampled_from(DTYPES))
        made[name] = torch.randint(0, 100, draw(shape)).to(dtype)
    return made


@given(stored=tensors(), cut=st.integers(1, 4), largest=st.integers(1, 200), dropped=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_copied_is_byte_identical(
    stored: dict[str, torch.Tensor], cut: int, largest: int, dropped: int
) -> None:
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "source", Path(place) / "target"
        source.mkdir()
        target.mkdir()
        parts = [dict(list(stored.items())[start::cut]) for start in range(min(cut, len(stored)))]
        places: dict[str, str] = {}
        for number, part in enumerate(parts):
            save_file(part, str(source / f"{number}.safetensors"), metadata={"format": "pt"})
            places |= dict.fromkeys(part, f"{number}.safetensors")
        (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        found = folder_tensors(source)
        kept = {f"new.{name}": found[name] for name in list(stored)[dropped:]} or {"all": found[next(iter(stored))]}
        write_tensors(target, kept, largest)

        files = sorted(target.glob("*.safetensors"))
        read = {name: tensor for file in files for name, tensor in load_file(str(file)).items()}
        assert set(read) == set(kept)
        for new, one in kept.items():
            old = next(name for name, tensor in found.items() if tensor is one)
            assert same(read[new], stored[old])
        if len(files) > 1:
            index = json.loads((target / INDEX).read_text())
            assert index["weight_map"] == {name: file.name for file in files for name in file_tensors(file)}
            assert index["metadata"]["total_size"] == sum(one.size for one in kept.values())
            for file in files:
                inside = file_tensors(file)
                assert len(inside) == 1 or sum(one.size for one in inside.values()) <= largest
        else:
            assert [file.name for file in files] == [f"{NAME}.safetensors"]
            assert not (target / INDEX).exists()


@given(stored=tensors(), first=st.integers(0, 5), count=st.integers(0, 5), wide=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rows_are_read_into_a_tensor(stored: dict[str, torch.Tensor], first: int, count: int, wide: bool) -> None:
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flcompress.models.shards.PIECE", 8)  # several pieces, of one number or more
        save_file(stored, f"{place}/{NAME}.safetensors", metadata={"format": "pt"})
        for name, tensor in folder_tensors(Path(place)).items():
            expected = stored[name]
            if expected.dim():
                start = min(first, len(expected))
                expected = expected[start : start + count]
                tensor = tensor.rows(start, len(expected))
            target = torch.empty(expected.shape, dtype=torch.float64 if wide else expected.dtype)
            tensor.fill(target)
            assert tensor.shape == expected.shape
            assert same(target, expected.to(target.dtype))


def test_a_dtype_that_torch_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / f"{NAME}.safetensors"
    tensor = StoredTensor(path, "I9", (4,), 0, 4)
    with pytest.raises(ModelError, match=r"a tensor in I9, expected F64, F32, .*; convert the file$"):
        tensor.fill(torch.empty(4))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    for number in (1, 2):
        tensor = {f"part{number}": torch.full((64,), float(number))}
        save_file(tensor, str(tmp_path / f"{NAME}-0000{number}-of-00002.safetensors"), metadata={"format": "pt"})
    places = {f"part{number}": f"{NAME}-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 512}, "weight_map": places}))
    return tmp_path


def refused(folder: Path) -> str:
    told = []
    for check in (check_weights, folder_tensors):
        with pytest.raises(ModelError) as caught:
            check(folder)
        told.append(str(caught.value))
    assert told[0] == told[1]
    return told[0]


def test_a_missing_shard_is_named(sharded: Path) -> None:
    path = sharded / f"{NAME}-00002-of-00002.safetensors"
    path.unlink()
    assert refused(sharded) == f"{path}: missing; {INDEX} names it; copy the shard again"


def test_a_short_shard_is_named(sharded: Path) -> None:
    path = sharded / f"{NAME}-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(sharded).startswith(f"{path}: not a whole safetensors file (")
    path.write_bytes(b"")
    assert refused(sharded).startswith(f"{path}: not a whole safetensors file (")


def test_a_shard_of_another_model_is_named(sharded: Path) -> None:
    one, two = (sharded / f"{NAME}-0000{number}-of-00002.safetensors" for number in (1, 2))
    shutil.copyfile(one, two)
    assert refused(sharded) == f"{two}: lacks tensor part2, which {INDEX} places in it; copy both again"


def test_an_index_that_leaves_its_folder_is_refused(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    told = "names the shard '../other.safetensors', expected a file of its own folder"
    assert refused(sharded) == f"{sharded / INDEX}: {told}"
    for damaged in ('{"weight_map": 3}', "[1]", "{"):
        (sharded / INDEX).write_text(damaged)
        assert refused(sharded) == f"{sharded / INDEX}: no index of shards (weight_map); copy the file again"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        folder_tensors(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no weights; expected {NAME}.safetensors, or shards with {INDEX}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_a_value_that_is_not_finite_is_found_in_any_dtype(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flcompress.models.shards.PIECE", 16)
    tensor = torch.ones(100)
    save_file({"fine": tensor.to(dtype)}, str(tmp_path / f"{NAME}.safetensors"))
    check_weights(tmp_path)
    tensor[-1] = torch.inf
    save_file({"fine": torch.ones(3), "bad": tensor.to(dtype)}, str(tmp_path / f"{NAME}.safetensors"))
    with pytest.raises(ModelError, match="tensor bad holds values that are not finite"):
        check_weights(tmp_path)


def test_a_double_beyond_single_precision_is_finite(tmp_path: Path) -> None:
    save_file({"large": torch.tensor([1e300, -1e300], dtype=torch.float64)}, str(tmp_path / f"{NAME}.safetensors"))
    check_weights(tmp_path)


def test_what_is_written_starts_at_a_multiple_of_eight_bytes(tmp_path: Path) -> None:
    """Readers map the tensors into memory where they lie; whatever the names' lengths."""
    for length in range(1, 9):
        source, target = tmp_path / f"source{length}", tmp_path / f"target{length}"
        source.mkdir()
        save_file({"n" * length: torch.ones(4)}, str(source / f"{NAME}.safetensors"))
        target.mkdir()
        write_tensors(target, folder_tensors(source))
        (file,) = target.glob("*.safetensors")
        (tensor,) = file_tensors(file).values()
        assert tensor.start % 8 == 0


FLOATS = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
    piece=st.sampled_from([8, 24, 1 << 24]),
)
@settings(max_examples=60, deadline=None)
def test_a_tensor_is_interpolated_in_its_own_dtype(
    shape: list[int], dtypes: tuple[torch.dtype, torch.dtype], share: float, seed: int, piece: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=draw).to(dtype) for dtype in dtypes)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr("flcompress.models.shards.PIECE", piece)
        folder = Path(place)
        save_file({"a": a, "b": b}, str(folder / f"{NAME}.safetensors"))
        stored = folder_tensors(folder)
        (folder / "out").mkdir()
        new = {
            "between": InterpolatedTensor(stored["a"], stored["b"], share),
            "itself": InterpolatedTensor(stored["a"], stored["a"], share),
            "own": InterpolatedTensor(stored["a"], stored["b"], 0.0),
            "other": InterpolatedTensor(stored["a"], stored["b"], 1.0),
        }
        write_tensors(folder / "out", new)
        read = load_file(str(folder / "out" / f"{NAME}.safetensors"))
    assert same(read["itself"], a)
    assert same(read["own"], a)
    assert same(read["other"], b.double().to(a.dtype))
    expected = (1.0 - share) * a.double() + share * b.double()
    assert read["between"].dtype == a.dtype
    torch.testing.assert_close(
        read["between"].double(), expected.to(a.dtype).double(), rtol=torch.finfo(a.dtype).eps, atol=1e-12
    )
