"""The dataset as passes see it."""

from __future__ import annotations

import json
import resource
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.data.dataset import LatentDataset
from flcompress.data.index import INDEX_FILE, Index, check_contents
from flcompress.errors import DataError
from tests.data.datasets import write_dataset

SMALL, WIDE, LONG = (9, 16, 16), (9, 16, 32), (17, 16, 16)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(latents: torch.Tensor) -> list[int]:
    return latents[:, 0, 0, 0, 0].int().tolist()


def test_a_batch_is_of_one_size_and_every_clip_brings_its_own_prompt(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {SMALL: 7, WIDE: 5}, first_frame=True))
    assert len(data) == 12
    for seed in range(20):
        latents, given = data.batch(6, draw(seed))
        assert latents.shape in {(6, 2, 3, 2, 2), (6, 2, 3, 2, 4)}
        assert latents.dtype == torch.float32
        drawn = numbers(latents)
        assert set(drawn) <= set(range(7) if latents.shape[-1] == 2 else range(7, 12))
        assert given["encoder_hidden_states"].shape == (6, 4, 8)
        assert given["encoder_hidden_states"][:, 0, 0].int().tolist() == [1 + n % 3 for n in drawn]
        assert given["mask"][:, 0].tolist() == [1 + n % 3 for n in drawn]
        assert given["first_frame"][:, 0].int().tolist() == [-n for n in drawn]
    assert {name: tensor.shape for name, tensor in data.negative.items()} == {
        "encoder_hidden_states": (1, 4, 8), "mask": (1, 1)}  # fmt: skip
    assert float(data.negative["encoder_hidden_states"].abs().max()) == 0.0


def test_the_same_seed_draws_the_same_batch(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {SMALL: 7, WIDE: 5}))
    assert torch.equal(data.batch(6, draw(3))[0], data.batch(6, draw(3))[0])


def test_every_clip_is_drawn_equally_often(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {SMALL: 2, WIDE: 6}))
    generator = draw()
    counts = Counter(number for _ in range(2000) for number in numbers(data.batch(1, generator)[0]))
    assert set(counts) == set(range(8))
    # 250 each with a standard deviation of 15; five of them is a bound that only a wrong draw leaves.
    assert all(abs(count - 250) < 75 for count in counts.values())


@settings(deadline=None, max_examples=40)  # each example writes files
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 26))
def test_a_split_keeps_every_clip_once(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], wanted: int
) -> None:
    folder = tmp_path_factory.mktemp("split") / "d"
    data = LatentDataset.load(write_dataset(folder, dict(zip((SMALL, WIDE, LONG), counts, strict=False)), a_shard=4))
    if wanted >= sum(counts):
        with pytest.raises(DataError, match=rf"data: {sum(counts)} clips given, expected more than the {wanted} that"):
            data.split(wanted)
        return
    training, heldout = data.split(wanted)
    assert (len(training), len(heldout)) == (sum(counts) - wanted, wanted)

    def held(one: LatentDataset) -> set[tuple[int, ...]]:
        return {tuple(place) for bucket in one._buckets for place in bucket.entries.tolist()}

    assert not held(training) & held(heldout)
    assert held(training) | held(heldout) == held(data)


def resident_mb() -> float:
    """Memory of this process now, pages of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def test_a_large_dataset_is_not_loaded(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", {(33, 512, 512): 384}, a_shard=48)
    assert sum(path.stat().st_size for path in folder.iterdir()) > 110e6
    before = resident_mb()
    data = LatentDataset.load(folder)
    for seed in range(4):
        data.batch(1, draw(seed))
    assert resident_mb() - before < 50  # loading it all would be 113


def test_conditions_of_clips_are_those_of_the_batch(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {SMALL: 7, WIDE: 5}, first_frame=True))
    latents, expected = data.batch(4, draw(1))
    shape, given = data.conditions(4, draw(1), (1, 1, 1, 1))
    assert shape == latents.shape
    assert all(torch.equal(given[name], value) for name, value in expected.items())


def test_prompts_alone(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {}))
    assert (len(data), data.prompts_only) == (0, True)
    shape, given = data.conditions(50, draw(), (16, 3, 8, 8))
    assert shape == (50, 16, 3, 8, 8)
    assert set(given["mask"][:, 0].tolist()) == {1, 2, 3}  # the empty prompt is only for guidance
    with pytest.raises(DataError, match="this dataset holds prompts only, no clips; encode one with --videos"):
        data.batch(1, draw())


@settings(deadline=None, max_examples=10)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 40), st.integers(0, 3))
def test_batches_size_by_size_hold_each_sizes_share(
    tmp_path_factory: pytest.TempPathFactory, counts: tuple[int, int, int], n: int, seed: int
) -> None:
    sizes = dict(zip((SMALL, WIDE, LONG), counts, strict=True))
    data = LatentDataset.load(write_dataset(tmp_path_factory.mktemp("sizes") / "d", sizes, first_frame=True))
    batches = list(data.by_size(n, draw(seed)))
    assert sum(len(latents) for latents, _ in batches) == n
    left = sum(counts)
    clips = [range(0, counts[0]), range(counts[0], counts[0] + counts[1]), range(counts[0] + counts[1], left)]
    for latents, conditioning in batches:
        drawn = numbers(latents)
        own_bucket = next(bucket for bucket in clips if drawn[0] in bucket)
        assert set(drawn) <= set(own_bucket)
        assert abs(len(drawn) - n * len(own_bucket) / left) < 1.0
        # As evenly as can be: none comes again before all have come.
        assert max(Counter(drawn).values()) == -(-len(drawn) // len(own_bucket))
        assert conditioning["encoder_hidden_states"][:, 0, 0].int().tolist() == [1 + number % 3 for number in drawn]
        assert conditioning["first_frame"][:, 0].int().tolist() == [-number for number in drawn]
    again = list(data.by_size(n, draw(seed)))
    assert all(torch.equal(bucket, other) for (bucket, _), (other, _) in zip(batches, again, strict=True))


def test_prompts_alone_have_no_batches_by_size(tmp_path: Path) -> None:
    data = LatentDataset.load(write_dataset(tmp_path / "d", {}))
    with pytest.raises(DataError, match=r"/d: this dataset holds prompts only, no clips; encode one with --videos"):
        next(data.by_size(4, draw()))


def shorten(folder: Path) -> None:
    path = folder / "clips-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def flip(folder: Path) -> None:
    path = folder / "clips-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


MEND = "encode again with the same command: only the damaged shard is redone"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "prompts-00001.safetensors").unlink(),
         r"prompts-00001\.safetensors: no such shard; index\.json names it; " + MEND),
        (shorten, r"clips-00001\.safetensors: \d+ bytes given, expected \d+; " + MEND),
        (flip, r"clips-00001\.safetensors: damaged \(its SHA-256 is not the one in index\.json\); " + MEND),
    ],
)  # fmt: skip
def test_a_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_dataset(tmp_path / "d", {SMALL: 7})
    check_contents(folder, Index.read(folder))
    damage(folder)
    with pytest.raises(DataError, match=message):
        check_contents(folder, Index.read(folder))


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a latent dataset \(no index\.json\); expected a folder that flcompress"):
        LatentDataset.load(tmp_path)
    path = tmp_path / INDEX_FILE
    path.write_text("{")
    with pytest.raises(DataError, match=r"index\.json: the file: Invalid JSON: .*; encode again into a new folder"):
        LatentDataset.load(tmp_path)
    write_dataset(tmp_path / "d", {SMALL: 2})
    index = json.loads((tmp_path / "d" / INDEX_FILE).read_text())
    (tmp_path / "d" / INDEX_FILE).write_text(json.dumps({**index, "prompts": ["", "one"]}))
    with pytest.raises(DataError, match=r"index\.json: its prompts and shards do not fit together"):
        LatentDataset.load(tmp_path / "d")
    (tmp_path / "d" / INDEX_FILE).write_text(json.dumps({**index, "version": 3}))
    with pytest.raises(DataError, match=r"index\.json: version: Input should be 1 or 2; encode again"):
        LatentDataset.load(tmp_path / "d")
