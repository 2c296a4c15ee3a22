"""Clips and captions as a network sees them: unit-scale latents and conditioning, read as they are drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flcompress.data.index import EMPTY, LATENTS, PER_CLIP, Index, check_sizes
from flcompress.data.sizes import Size
from flcompress.errors import DataError

_OPEN_SHARDS = 64
ALL = slice(None)


class _Reader:
    """Rows of a dataset's shards, mapped into memory: only what is read is loaded."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._ends = list(accumulate(shard.prompts for shard in index.prompt_shards))
        self._shard = lru_cache(_OPEN_SHARDS)(self._opened)

    def prompts(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Conditioning of prompts, [prompts, ...]."""
        places = []
        for number in numbers:
            shard = bisect_right(self._ends, number)
            start = self._ends[shard - 1] if shard else 0
            places.append((self._index.prompt_shards[shard].file, number - start))
        return self._rows(places, self._names(places[0][0]))

    def latents(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Latents [clips, ...] of (shard, row) each, fp32."""
        return self._rows(self._files(places), [LATENTS])[LATENTS].float()

    def own(self, places: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What else conditions those clips, such as their first frames, [clips, ...] each; nothing for most models."""
        names = [name for name in self._names(self._files(places)[0][0]) if name.startswith(PER_CLIP)]
        return {name.removeprefix(PER_CLIP): value for name, value in self._rows(self._files(places), names).items()}

    def shape(self, shard: int) -> tuple[int, ...]:
        """(channels, frames, height, width) of a shard's latents."""
        file = self._shard(self._index.clip_shards[shard].file)
        return tuple(file.get_slice(LATENTS).get_shape()[1:])

    def _names(self, file: str) -> list[str]:
        return list(self._shard(file).keys())

    def _files(self, places: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        return [(self._index.clip_shards[shard].file, row) for shard, row in places]

    def _rows(self, places: Sequence[tuple[str, int]], names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {
            name: torch.cat([self._shard(file).get_slice(name)[row : row + 1] for file, row in places])
            for name in names
        }

    def _opened(self, file: str) -> Any:
        try:
            return safe_open(str(self._folder / file), framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self._folder / file}: not a whole shard ({error}); "
                "encode again with the same command: only the damaged shard is redone"
            ) from error


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Clips of one size: `places` [clips, 3] is the shard, the row in it and the prompt of each."""

    size: Size
    places: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """A dataset that `flcompress encode` wrote; it may be larger than memory. See docs/data.md.

    Attributes:
        folder: where it lies.
        captions: the texts; the first is the empty prompt.
        captions_start: number of the first of them that is a caption.
        empty: conditioning by the empty prompt, [1, ...] each.
        negative: the same by what guidance leads away from, which is the empty prompt in most datasets.
    """

    folder: Path
    captions: tuple[str, ...]
    captions_start: int
    empty: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor]
    _reader: _Reader
    _buckets: tuple[_Bucket, ...]

    @classmethod
    def load(cls, folder: Path) -> LatentDataset:
        """Open a dataset; its index and the sizes of its files are checked, its contents read when they are drawn.

        Raises:
            DataError: no dataset, or a shard that is missing or short.
        """
        index = Index.read(folder)
        check_sizes(folder, index)
        places: dict[Size, list[tuple[int, int, int]]] = {}
        for number, shard in enumerate(index.clip_shards):
            places.setdefault(shard.size, []).extend((number, row, clip.prompt) for row, clip in enumerate(shard.clips))
        buckets = tuple(_Bucket(size, torch.tensor(places[size])) for size in sorted(places))
        reader = _Reader(folder, index)
        empty, negative = reader.prompts([EMPTY]), reader.prompts([index.captions_start - 1])
        return cls(folder, index.prompts, index.captions_start, empty, negative, reader, buckets)

    def __len__(self) -> int:
        return sum(len(bucket.places) for bucket in self._buckets)

    @property
    def prompts_only(self) -> bool:
        """Whether it holds no clips."""
        return not self._buckets

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(frames, height, width), in pixels, of its clips."""
        return tuple(bucket.size for bucket in self._buckets)

    def batch(
        self, n: int, generator: torch.Generator, mine: slice = ALL
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`n` clips of one size, drawn with replacement: latents [n, channels, frames, height, width], conditioning.

        The size is drawn first, each as often as it has clips. Only those in `mine` are read and returned.

        Raises:
            DataError: a dataset of prompts only.
        """
        return self._read(self._draw(n, generator, mine))

    def conditions(
        self, n: int, generator: torch.Generator, latents: tuple[int, int, int, int], mine: slice = ALL
    ) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        """What `n` samples are generated from: the shape [n, ...] of their latents and their conditioning.

        Those of drawn clips; of prompts alone, each drawn with replacement, where there are no clips.

        Args:
            n: samples.
            generator: of the draws.
            latents: (channels, frames, height, width) for prompts that have no clips.
            mine: which of the samples are read and returned.
        """
        if self.prompts_only:
            chosen = torch.randint(self.captions_start, len(self.captions), (n,), generator=generator)
            chosen = chosen[mine]
            return (len(chosen), *latents), self._reader.prompts(chosen.tolist())
        rows, prompts = _split(self._draw(n, generator, mine))
        return (len(rows), *self._reader.shape(rows[0][0])), self._reader.prompts(prompts) | self._reader.own(rows)

    def by_size(self, n: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """`n` clips in all, a batch for each size in turn: what is measured on them is of the whole dataset.

        A size's share of `n` is that of its clips, rounded; a size without a share is left out. Clips are drawn without
        replacement, and again from the start where there are fewer than the share.

        Args:
            n: clips.
            generator: of the draws; the same one gives the same batches.

        Yields:
            latents [share, channels, frames, height, width], and their conditioning.

        Raises:
            DataError: a dataset of prompts only.
        """
        self._require_clips()
        for bucket, share in zip(self._buckets, self._shares(n), strict=True):
            order = torch.randperm(len(bucket.places), generator=generator)
            if share:
                yield self._read(bucket.places[order[torch.arange(share) % len(order)]])

    def split(self, heldout: int) -> tuple[LatentDataset, LatentDataset]:
        """(training part, the last `heldout` clips): monitors must not be read off the clips that are trained on.

        Of several sizes each gives its share.
        """
        total = len(self)
        if not 0 < heldout < total:
            raise DataError(f"data: {total} clips given, expected more than the {heldout} that monitors hold out")
        training, held = [], []
        for bucket, share in zip(self._buckets, self._shares(heldout), strict=True):
            kept = len(bucket.places) - share
            training.append(replace(bucket, places=bucket.places[:kept]))
            held.append(replace(bucket, places=bucket.places[kept:]))
        return self._with(training), self._with(held)

    def _with(self, buckets: Sequence[_Bucket]) -> LatentDataset:
        return replace(self, _buckets=tuple(bucket for bucket in buckets if len(bucket.places)))

    def _shares(self, n: int) -> list[int]:
        """How many of `n` clips are of each size, if all have their share."""
        total, seen, found = len(self), 0, []
        for bucket in self._buckets:
            size = len(bucket.places)
            found.append(n * (seen + size) // total - n * seen // total)
            seen += size
        return found

    def _require_clips(self) -> None:
        if self.prompts_only:
            raise DataError(f"{self.folder}: this dataset holds prompts only, no clips; encode one with --videos")

    def _draw(self, n: int, generator: torch.Generator, mine: slice) -> torch.Tensor:
        """Places of `n` clips of one size; those in `mine`."""
        self._require_clips()
        bucket = self._buckets[0]
        if len(self._buckets) > 1:
            weights = torch.tensor([float(len(bucket.places)) for bucket in self._buckets])
            bucket = self._buckets[int(torch.multinomial(weights, 1, generator=generator))]
        chosen = torch.randint(len(bucket.places), (n,), generator=generator)
        return bucket.places[chosen[mine]]

    def _read(self, places: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Latents and conditioning of the clips at places [n, 3]."""
        rows, prompts = _split(places)
        return self._reader.latents(rows), self._reader.prompts(prompts) | self._reader.own(rows)


def _split(places: torch.Tensor) -> tuple[list[tuple[int, int]], list[int]]:
    """(shard, row) of clips, and their prompts."""
    listed = places.tolist()
    return [(shard, row) for shard, row, _ in listed], [prompt for *_, prompt in listed]
