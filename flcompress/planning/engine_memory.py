"""What one process holds of a role under each engine. Every term is something that the engine allocates."""

from __future__ import annotations

from dataclasses import dataclass

from flcompress.core.settings import EngineName

FLOAT, HALF = 4, 2
"""Bytes of a number. What is trained is fp32, with its gradients and moments; frozen weights are of the precision."""
BUCKET = 500_000_000
"""Numbers in the buffer that DeepSpeed reduces gradients from (`reduce_bucket_size`, its default)."""
LIVE = 1_000_000_000
"""Numbers of gathered weights that ZeRO-3 may keep (`stage3_max_live_parameters`, its default)."""


@dataclass(frozen=True, slots=True)
class Place:
    """One process of a training.

    Attributes:
        engine: how the processes share the training.
        processes: how many there are.
        gpu: whether it runs on a GPU. DeepSpeed's buffers are reserved whole there; a CPU hands out only what is
            written to.
    """

    engine: EngineName
    processes: int
    gpu: bool

    @property
    def splits_weights(self) -> bool:
        """Whether a process has only its part of them."""
        return self.engine in ("zero3", "fsdp2")

    def weights(self, size: float) -> float:
        """What one process has of weights, or of an average of them."""
        return size / self.processes if self.splits_weights else size

    def gathered(self, size: float, numbers: float, blocks: float) -> float:
        """Most of the weights that are put together at once.

        Args:
            size: bytes of the weights.
            numbers: how many they are.
            blocks: share of them that is outside of all blocks or in the two largest.
        """
        if self.engine == "zero3":
            return size * min(1.0, LIVE / max(numbers, 1.0))
        return size * blocks if self.engine == "fsdp2" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Updating:
    """Bytes that an engine takes for a role's gradients and its update.

    Attributes:
        gradients: of one process when they are reduced.
        lasting: what stays from step to step beside weights, moments and average.
        forward: what is there beside the activations when the backward begins; of a later micro batch the gradients of
            those before too.
        backward: the most at the end of the backward.
        step: the most while AdamW steps.
    """

    gradients: float
    lasting: float = 0.0
    forward: float = 0.0
    backward: float
    step: float


def moments(numbers: float, place: Place) -> float:
    """Bytes on one process of the optimiser's moments, `numbers` over all."""
    shared = 1 if place.engine in ("local", "ddp") else place.processes
    return FLOAT * numbers / shared


def updating(trained: float, moments: int, gathered: float, place: Place, *, micro_batches: bool = False) -> Updating:
    """What an update takes on one process.

    Args:
        trained: how many parameters are trained.
        moments: of each of them.
        gathered: bytes of weights that are put together at once.
        place: the process.
        micro_batches: whether gradients add up over several.
    """
    whole = FLOAT * trained
    part = whole / place.processes
    # AdamW's denominator is as large as the tensor that is stepped: here one flat one. On the CPU there are two. With
    # one moment it is stepped in slices.
    denominator = 0.0 if moments == 1 else part if place.gpu else 2.0 * part
    sent = FLOAT * min(BUCKET, trained)
    bucket = FLOAT * BUCKET if place.gpu else sent
    waiting = (part if place.engine in ("zero2", "fsdp2") else whole) * micro_batches
    match place.engine:
        case "local":
            return Updating(gradients=whole, forward=waiting, backward=whole, step=whole)
        case "ddp":  # gradients lie in its buckets, which stay; until the last micro batch they lie outside
            return Updating(gradients=0.0, lasting=whole, forward=waiting, backward=0.0, step=0.0)
        case "fsdp2":  # gathered weights and their gradients, and the same again on their way to the others
            return Updating(gradients=part, forward=waiting + gathered, backward=part + 3.0 * gathered, step=part)
        case "zero3":  # its part of the gradients, the bucket and what was gathered stay; a step flattens the part
            return Updating(
                gradients=part,
                lasting=part + bucket + gathered,
                backward=part + sent * (1.0 if place.gpu else 2.0),
                step=part + denominator,
            )
    # zero1 and zero2: the fp32 part that is stepped is a copy. The bucket is reduced in a flat copy of its own.
    # And zero2 adds the part of a micro batch to those before.
    left = whole - sent if place.engine == "zero1" else waiting
    return Updating(
        gradients=whole if place.engine == "zero1" else part,
        lasting=part,
        forward=waiting + bucket,
        backward=left + bucket + sent + part,
        step=2.0 * part + denominator,
    )
