"""Interpolate two checkpoints of one transformer on disk, in little memory."""

from __future__ import annotations

from pathlib import Path

from flcompress.models.configs import check_transformer_config
from flcompress.models.loading import meta_transformer
from flcompress.models.part_check import matching_tensors
from flcompress.models.shards import LARGEST_SHARD, InterpolatedTensor, Writable, write_model


def interpolate_on_disk(
    folder: Path, other: Path, share: float, target: Path, *, largest_shard: int = LARGEST_SHARD
) -> None:
    """Write to `target` the transformer of `folder` with `share` of its weights from `other`: (1 - share) a + share b.

    Computed in fp64 and rounded to the dtype in `folder`; tensors of whole numbers keep every byte.

    Args:
        folder: a transformer.
        other: one of the same configuration; its dtype may differ.
        share: in [0, 1].
        target: the folder to write.
        largest_shard: bytes of tensors in one file.

    Raises:
        ModelError: weights that are missing, short, or not those of the configuration in `folder`.
    """
    config = check_transformer_config(folder)
    model = meta_transformer(folder)
    theirs = matching_tensors(other, model)
    tensors: dict[str, Writable] = {
        name: InterpolatedTensor(own, theirs[name], share) if own.floating else own
        for name, own in matching_tensors(folder, model).items()
    }
    write_model(target, tensors, config, largest_shard)
