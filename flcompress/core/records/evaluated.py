"""What `flcompress eval` and `generate` leave next to clips: a line for each clip, what made it, and its figures."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat

from flcompress.core.records.base import Part, Record
from flcompress.core.records.run import Number


class ClipLine(Record):
    """A line of `manifest-RANK.jsonl` in a folder of clips: one clip file, and all that it was made from.

    Attributes:
        number: which of the clips of this prompt and seed.
        seconds: time that sampling and decoding took; None of a real clip.
        decoding_seconds: the decoder's part of it; None where it is not known, as of a stock pipeline.
    """

    file: str
    sha256: str
    item: str
    prompt: str
    image: str | None = None
    seed: int
    number: int
    frames: int
    height: int
    width: int
    frame_rate: Number
    seconds: FiniteFloat | None = None
    decoding_seconds: FiniteFloat | None = None


class ClipsFile(Record):
    """`clips.json` of a folder that `flcompress generate --prompts` fills: what made its clips.

    Attributes:
        student: hash of the sampling facts of the diffusers export.
        export: cache key of what the back end runs; None where that was not noted.
        options: the back end's.
        frame_local: share whose blocks attend within latent frames; None where all attend to all.
    """

    FIX = "choose another --out"

    student: str
    export: str | None
    backend: str
    options: dict[str, Any]
    negative_prompt: str
    frame_rate: Number
    frame_local: Number | None = None


class MeasuredLine(Record):
    """A line of `eval/SUITE/measured-RANK.jsonl`: what a suite measured on one clip file.

    Attributes:
        key: hash of the suite's version and of the files that it read: the clip, its teacher's, its image.
        figures: figure -> value; one that is undefined on this clip is not there.
        features: name -> vector, for figures of sets of clips.
        seconds: time that this took.
    """

    key: str
    figures: dict[str, FiniteFloat]
    features: dict[str, list[FiniteFloat]] = Field(default_factory=dict)
    seconds: FiniteFloat | None = None


class ScoreLine(Record):
    """A line of `eval/SUITE/clips.jsonl`: a clip of a contender and its figures, for the report's worst cases."""

    contender: str
    file: str
    prompt: str
    seed: int
    figures: dict[str, FiniteFloat]


class BlindPair(Part):
    """A pair of clips on the page of a blind comparison.

    Attributes:
        pair: its name on the page, which says nothing of the sides.
        file: name of both clips in their contenders' folders.
        student: the side that the student's is on.
    """

    pair: str
    file: str
    prompt: str
    student: Literal["left", "right"]


class BlindFile(Record):
    """`eval/blind.json`: which side of `blind.html` is whose; `teacher` is its label."""

    page: str
    program: str
    suite: str
    teacher: str
    pairs: list[BlindPair]


class VotesFile(Record):
    """What `blind.html` exports: pair -> "left", "right" or "same"."""

    page: str
    votes: dict[str, str]
