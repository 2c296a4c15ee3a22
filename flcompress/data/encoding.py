"""`flcompress encode`: what is asked for, checked, planned and made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flcompress.data.captions import odd_names, read_captions, read_prompts, without_caption
from flcompress.data.encoder import Encoder, Skipped
from flcompress.data.index import INDEX_FILE, NEGATIVE, SKIPPED_FILE, WORK, Index
from flcompress.data.making import clean, make, mend, store_plan, stored_plan, stored_request
from flcompress.data.planning import plan_clips, plan_prompts
from flcompress.data.sizes import OWN_SIZE, Size, Target
from flcompress.data.workers import Run, workers
from flcompress.errors import DataError
from flcompress.files import lines_of, locked, working_alone
from flcompress.models.configs import check_transformer_config
from flcompress.models.families import family_of
from flcompress.models.latent_size import folder_grid
from flcompress.models.parts import part_names
from flcompress.models.stock_files import folder_digest
from flcompress.progress import Display

_TOLD = ("max_sequence_length", "fps", NEGATIVE)
"""Parts of a request that are said in full where they differ."""
_TOGETHER = 32
"""Videos that a process measures at once."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to encode.

    Attributes:
        index: `model_index.json` of the pipeline whose text encoders and autoencoder are used.
        components: folders of its parts, and of its transformer.
        captions: captions of the videos, or prompts.
        out: folder of the dataset.
        videos: folder of the videos; None for prompts only.
        target: size of the clips.
        fps: frames a second of the clips; None takes every frame of a video.
        max_sequence_length: tokens a prompt is padded to.
        negative_prompt: what guidance leads away from.
        processes: how many encode.
        device: "cpu" or "cuda".
    """

    index: Mapping[str, Any]
    components: Mapping[str, Path]
    captions: Path
    out: Path
    videos: Path | None = None
    target: Target = OWN_SIZE
    fps: float | None = None
    max_sequence_length: int = 512
    negative_prompt: str = ""
    processes: int = 1
    device: str = "cpu"

    def identity(self, files: Sequence[str]) -> dict[str, Any]:
        """What decides the dataset's contents, without where anything lies."""
        videos = None
        if self.videos is not None:
            listed = [(file, (self.videos / file).stat().st_size) for file in sorted(files)]
            videos = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return {
            "pipeline": self.index["_class_name"],
            "parts": parts_digests(self.index, self.components),
            "captions": hashlib.sha256(self.captions.read_bytes()).hexdigest(),
            "videos": videos,
            "target": asdict(self.target),
            "fps": self.fps,
            "max_sequence_length": self.max_sequence_length,
            **({NEGATIVE: self.negative_prompt} if self.negative_prompt else {}),
        }


def parts_digests(index: Mapping[str, Any], components: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of every part of a pipeline that encodes, by name, and how its transformer takes a first frame."""
    made = {name: folder_digest(components[name]) for name in part_names(index)}
    family = family_of(index["_class_name"])
    if index["_class_name"] in family.from_image:
        way = family.image_condition(check_transformer_config(components["transformer"]))
        made |= {"transformer's image condition": way} if way else {}
    return made


def folder_request(
    pipeline: Path,
    captions: Path,
    out: Path,
    videos: Path | None = None,
    target: Target = OWN_SIZE,
    max_sequence_length: int = 512,
    processes: int = 1,
    pipeline_class: str | None = None,
    fps: float | None = None,
    negative_prompt: str = "",
) -> Request:
    """A request to encode with the parts of a pipeline folder, on a GPU if there is one.

    Args:
        pipeline: the folder.
        captions: see `Request`, as for those that follow.
        pipeline_class: another stock pipeline class of the model's family, where not the one the folder names.
    """
    import torch

    from flcompress.models.folder import check_pipeline

    index = check_pipeline(pipeline)
    known = family_of(index["_class_name"]).pipelines
    if pipeline_class is not None and pipeline_class not in known:
        raise DataError(f"--pipeline-class {pipeline_class}: expected {' or '.join(known)} for this model")
    index["_class_name"] = pipeline_class or index["_class_name"]
    components = {name: pipeline / name for name in ("transformer", *part_names(index))}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Request(
        index=index,
        components=components,
        captions=captions,
        out=out,
        videos=videos,
        target=target,
        fps=fps,
        max_sequence_length=max_sequence_length,
        negative_prompt=negative_prompt,
        processes=processes,
        device=device,
    )


def encode(request: Request, display: Display, *, wait: bool = False) -> dict[str, Any]:
    """Make the dataset, or what is missing of it.

    Args:
        request: what to encode.
        display: where progress is shown.
        wait: let another process that works on the same folder finish first; else it is refused.

    Returns:
        A summary: clips, prompts, buckets, skipped videos, shards, bytes, and how many shards were made now.

    Raises:
        DataError: captions, videos or sizes that cannot be; a folder that holds something else.
        FlcompressError: a worker was ended from outside; the same command goes on.
        OSError: the disk is full, or `out` cannot be written.
    """
    target = request.target
    if request.videos is None:
        if target != OWN_SIZE or request.fps is not None:
            raise DataError(
                "encode: a size or frame rate is given, but no --videos; prompts have none: the recipe's sampling "
                "decides"
            )
        if request.index["_class_name"] in family_of(request.index["_class_name"]).from_image:
            raise DataError(
                f"encode: {request.index['_class_name']} starts from a first frame, which prompts alone do not have; "
                "give --videos"
            )
        captioned, uncaptioned, prompts = [], [], read_prompts(request.captions)
        if request.negative_prompt in prompts:
            raise DataError(
                f"{request.captions}: the negative prompt is one of the prompts ({request.negative_prompt!r}); a model "
                "is not trained towards it: take it out of the file"
            )
    else:
        grid = folder_grid(request.components["transformer"], request.components["vae"])
        target.check(grid)
        target = target.on(grid)
        captioned, prompts = read_captions(request.captions, request.videos), []
        uncaptioned = without_caption(request.videos, captioned)
        for remark in odd_names(request.videos, captioned):
            display.line(f"{request.captions}: {remark}")
    identity = request.identity([*(one.file for one in captioned), *uncaptioned])
    _check_out(request.out, identity)
    encoder = Encoder(
        index=request.index,
        components=request.components,
        device=request.device,
        max_sequence_length=request.max_sequence_length,
        out=request.out,
        videos=request.videos or Path(),
        resize=target.height is not None,
        fps=request.fps,
        frames=target.frames,
    )
    request.out.mkdir(parents=True, exist_ok=True)
    with _alone(request.out, wait, display), workers(encoder, request.processes) as run:
        if (request.out / INDEX_FILE).exists():
            made = mend(request.out, run, display)
        else:
            plan = stored_plan(request.out)
            if plan is None:
                if request.videos is None:
                    plan = plan_prompts(prompts, request.negative_prompt)
                else:
                    measured = _measure([one.file for one in captioned], run, display)
                    plan = plan_clips(captioned, measured, uncaptioned, target, grid, request.negative_prompt)
                store_plan(request.out, plan, identity)
            made = make(request.out, plan, identity, run, display)
    clean(request.out)
    return summary(request.out, made)


def summary(out: Path, made: int) -> dict[str, Any]:
    """What a dataset holds; `made` is how many of its shards were made now."""
    index = Index.read(out)
    buckets: dict[Size, int] = {}
    for shard in index.clip_shards:
        buckets[shard.size] = buckets.get(shard.size, 0) + len(shard.clips)
    skipped = out / SKIPPED_FILE
    return {
        "out": str(out),
        "clips": index.clips,
        "prompts": len(index.prompts) - index.captions_start,
        "skipped": len(lines_of(skipped.read_text(encoding="utf-8"))) if skipped.exists() else 0,
        "buckets": [{"frames": f, "height": h, "width": w, "clips": n} for (f, h, w), n in sorted(buckets.items())],
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "made": made,
    }


def summary_text(made: dict[str, Any]) -> str:
    """A summary for people."""
    what = f"{made['clips']:,} clips, " if made["clips"] else ""
    lines = [
        f"{made['out']}: {what}{made['prompts']:,} prompts, {made['shards']:,} shards, {made['bytes'] / 1e6:,.1f} MB"
    ]
    lines += [f"  {b['frames']} x {b['height']} x {b['width']}: {b['clips']:,} clips" for b in made["buckets"]]
    if made["skipped"]:
        lines.append(f"{made['skipped']:,} videos skipped: {Path(made['out']) / SKIPPED_FILE} says why")
    if not made["made"]:
        lines.append("nothing to do: every shard is there and whole")
    return "\n".join(lines)


def _check_out(out: Path, identity: dict[str, Any]) -> None:
    """Raise DataError where `out` holds another dataset, or something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: a file, expected a folder; choose another --out")
    found = stored_request(out)
    if found is None:
        if out.is_dir() and any(path.name != WORK for path in out.iterdir()):
            raise DataError(f"{out}: not empty and no latent dataset (no {INDEX_FILE}); choose another --out")
        return
    for key in (*identity, *(key for key in found if key not in identity)):
        there, given = found.get(key), identity.get(key)
        if there != given:
            told = f"{key}: {there} there, {given} given" if key in _TOLD else f"other {key}"
            raise DataError(f"{out}: holds a dataset made from another request ({told}); choose another --out")


def _measure(files: Sequence[str], run: Run, display: Display) -> dict[str, Size | Skipped]:
    measured: dict[str, Size | Skipped] = {}
    groups = [tuple(files[start : start + _TOGETHER]) for start in range(0, len(files), _TOGETHER)]
    with display.stage("measuring videos") as progress:
        for some in run(Encoder.measure, groups):
            measured |= some
            progress(len(measured), len(files), {})
    return measured


@contextmanager
def _alone(out: Path, wait: bool, display: Display) -> Iterator[None]:
    """Hold the dataset's folder; where another process has it, wait for that one or raise RequestError."""
    if wait:
        with locked(out, wait=True):
            yield
    else:
        busy = f"{out}: another flcompress is encoding into this folder; wait for it"
        with working_alone(out, busy, display.line):
            yield
