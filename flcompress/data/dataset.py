"""Latent datasets: unit-scale latents and conditioning, read from disk as they are drawn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flcompress.data.compact import rows_of, stored_row
from flcompress.data.index import EMPTY, LATENTS, PER_CLIP, Index, check_sizes
from flcompress.data.sizes import Size
from flcompress.errors import DataError

_OPEN_SHARDS = 64
ALL = slice(None)


class _ShardReader:
    """Reads rows of a dataset's shards, which are mapped into memory: only rows that are read are loaded."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self._index = folder, index
        self._ends = list(accumulate(shard.prompts for shard in index.prompt_shards))
        self._shard = lru_cache(_OPEN_SHARDS)(self._open)
        self._keys = lru_cache(_OPEN_SHARDS)(lambda file: frozenset(self._shard(file).keys()))

    def prompts(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the conditioning of prompts, [prompts, ...] each."""
        rows = []
        for number in numbers:
            shard = bisect_right(self._ends, number)
            start = self._ends[shard - 1] if shard else 0
            rows.append((self._index.prompt_shards[shard].file, number - start))
        return self._rows(rows, self._names(rows[0][0]))

    def latents(self, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return the latents at (shard, row) pairs, [clips, ...] in fp32."""
        return self._rows(self._with_files(rows), [LATENTS])[LATENTS]

    def clip_conditioning(self, rows: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """Return the clips' own conditioning, such as first frames, [clips, ...] each; empty for most models."""
        names = [name for name in self._names(self._with_files(rows)[0][0]) if name.startswith(PER_CLIP)]
        return {name.removeprefix(PER_CLIP): value for name, value in self._rows(self._with_files(rows), names).items()}

    def shape(self, shard: int) -> tuple[int, ...]:
        """Return (channels, frames, height, width) of a shard's latents."""
        file = self._shard(self._index.clip_shards[shard].file)
        return tuple(file.get_slice(LATENTS).get_shape()[1:])

    def _names(self, file: str) -> list[str]:
        keys = self._keys(file)
        return sorted(keys - {rows_of(name) for name in keys})

    def _with_files(self, rows: Sequence[tuple[int, int]]) -> list[tuple[str, int]]:
        return [(self._index.clip_shards[shard].file, row) for shard, row in rows]

    def _rows(self, rows: Sequence[tuple[str, int]], names: Sequence[str]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([self._row(file, name, row) for file, row in rows]) for name in names}

    def _row(self, file: str, name: str, row: int) -> torch.Tensor:
        return stored_row(self._shard(file), name, row, compacted=rows_of(name) in self._keys(file))

    def _open(self, file: str) -> Any:
        try:
            return safe_open(str(self._folder / file), framework="pt")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{self._folder / file}: not a whole shard ({error}); "
                "encode again with the same command: only the damaged shard is redone"
            ) from error


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Clips of one size; `entries` [clips, 3] holds the shard, the row in it and the prompt of each."""

    size: Size
    entries: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentDataset:
    """A dataset that `flcompress encode` wrote; it may be larger than memory. See docs/data.md.

    Attributes:
        folder: its folder.
        captions: the texts; the first is the empty prompt.
        captions_start: index of the first caption among them.
        empty: conditioning on the empty prompt, [1, ...] each.
        negative: conditioning on the negative prompt of guidance, in most datasets the empty one, [1, ...] each.
    """

    folder: Path
    captions: tuple[str, ...]
    captions_start: int
    empty: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor]
    _reader: _ShardReader
    _buckets: tuple[_Bucket, ...]

    @classmethod
    def load(cls, folder: Path) -> LatentDataset:
        """Open a dataset: check its index and file sizes; contents are read when they are drawn.

        Raises:
            DataError: no dataset, or a missing or truncated shard.
        """
        index = Index.read(folder)
        check_sizes(folder, index)
        entries: dict[Size, list[tuple[int, int, int]]] = {}
        for number, shard in enumerate(index.clip_shards):
            entries.setdefault(shard.size, []).extend(
                (number, row, clip.prompt) for row, clip in enumerate(shard.clips)
            )
        buckets = tuple(_Bucket(size, torch.tensor(entries[size])) for size in sorted(entries))
        reader = _ShardReader(folder, index)
        empty, negative = reader.prompts([EMPTY]), reader.prompts([index.captions_start - 1])
        return cls(folder, index.prompts, index.captions_start, empty, negative, reader, buckets)

    def __len__(self) -> int:
        return sum(len(bucket.entries) for bucket in self._buckets)

    @property
    def prompts_only(self) -> bool:
        """Whether the dataset holds no clips."""
        return not self._buckets

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Sizes of the clips, (frames, height, width) in pixels."""
        return tuple(bucket.size for bucket in self._buckets)

    def batch(
        self, n: int, generator: torch.Generator, mine: slice = ALL
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw `n` clips of one size with replacement.

        The size is drawn first, with probability proportional to its clips. Only clips in `mine` are read and
        returned.

        Returns:
            Latents [n, channels, frames, height, width], and their conditioning.

        Raises:
            DataError: a dataset of prompts only.
        """
        return self._read(self._draw(n, generator, mine))

    def conditions(
        self, n: int, generator: torch.Generator, latents: tuple[int, int, int, int], mine: slice = ALL
    ) -> tuple[tuple[int, ...], dict[str, torch.Tensor]]:
        """Draw the starting point of `n` generated samples: the shape [n, ...] of their latents, and conditioning.

        They are those of drawn clips or, in a dataset of prompts only, of prompts drawn with replacement.

        Args:
            n: number of samples.
            generator: source of the draws.
            latents: (channels, frames, height, width) for prompts without clips.
            mine: the samples that are read and returned.
        """
        if self.prompts_only:
            chosen = torch.randint(self.captions_start, len(self.captions), (n,), generator=generator)
            chosen = chosen[mine]
            return (len(chosen), *latents), self._reader.prompts(chosen.tolist())
        rows, prompts = _rows_and_prompts(self._draw(n, generator, mine))
        return (len(rows), *self._reader.shape(rows[0][0])), self._reader.prompts(
            prompts
        ) | self._reader.clip_conditioning(rows)

    def by_size(self, n: int, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Yield `n` clips in all, one batch per size, so that measurements represent the whole dataset.

        Each size's share of `n` is proportional to its clips, rounded; a size whose share is zero is omitted. Clips are
        drawn without replacement, starting over if there are fewer than the share.

        Args:
            n: number of clips.
            generator: source of the draws; the same state gives the same batches.

        Yields:
            Latents [share, channels, frames, height, width], and their conditioning.

        Raises:
            DataError: a dataset of prompts only.
        """
        self._require_clips()
        for bucket, share in zip(self._buckets, self._shares(n), strict=True):
            order = torch.randperm(len(bucket.entries), generator=generator)
            if share:
                yield self._read(bucket.entries[order[torch.arange(share) % len(order)]])

    def in_order(self, n: int, *, latents: bool = True) -> Iterator[tuple[torch.Tensor, str]]:
        """Yield the first `n` clips in the order of the dataset: latents [1, ...] in fp32, and the caption.

        Args:
            n: most clips to yield.
            latents: whether latents are read; else they are empty.
        """
        self._require_clips()
        rows = (row for bucket in self._buckets for row in bucket.entries.tolist())
        for shard, row, prompt in islice(rows, n):
            clip = self._reader.latents([(shard, row)]) if latents else torch.empty(0)
            yield clip, self.captions[prompt]

    def split(self, heldout: int) -> tuple[LatentDataset, LatentDataset]:
        """Split into (training part, the last `heldout` clips): monitors must not evaluate on training clips.

        Every size contributes its share.
        """
        total = len(self)
        if not 0 < heldout < total:
            raise DataError(f"data: {total} clips given, expected more than the {heldout} that monitors hold out")
        training, reserve = [], []
        for bucket, share in zip(self._buckets, self._shares(heldout), strict=True):
            size = len(bucket.entries) - share
            training.append(replace(bucket, entries=bucket.entries[:size]))
            reserve.append(replace(bucket, entries=bucket.entries[size:]))
        return self._with_buckets(training), self._with_buckets(reserve)

    def _with_buckets(self, buckets: Sequence[_Bucket]) -> LatentDataset:
        return replace(self, _buckets=tuple(bucket for bucket in buckets if len(bucket.entries)))

    def _shares(self, n: int) -> list[int]:
        """Return how many of `n` clips fall to each size, in proportion to its clips."""
        total, before, shares = len(self), 0, []
        for bucket in self._buckets:
            size = len(bucket.entries)
            shares.append(n * (before + size) // total - n * before // total)
            before += size
        return shares

    def _require_clips(self) -> None:
        if self.prompts_only:
            raise DataError(f"{self.folder}: this dataset holds prompts only, no clips; encode one with --videos")

    def _draw(self, n: int, generator: torch.Generator, mine: slice) -> torch.Tensor:
        """Draw the entries of `n` clips of one size, and return those in `mine`."""
        self._require_clips()
        bucket = self._buckets[0]
        if len(self._buckets) > 1:
            weights = torch.tensor([float(len(bucket.entries)) for bucket in self._buckets])
            bucket = self._buckets[int(torch.multinomial(weights, 1, generator=generator))]
        chosen = torch.randint(len(bucket.entries), (n,), generator=generator)
        return bucket.entries[chosen[mine]]

    def _read(self, entries: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return latents and conditioning of the clips of entries [n, 3]."""
        rows, prompts = _rows_and_prompts(entries)
        return self._reader.latents(rows), self._reader.prompts(prompts) | self._reader.clip_conditioning(rows)


def _rows_and_prompts(entries: torch.Tensor) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the (shard, row) pairs of entries [n, 3], and their prompts."""
    listed = entries.tolist()
    return [(shard, row) for shard, row, _ in listed], [prompt for *_, prompt in listed]
