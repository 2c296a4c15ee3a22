"""`flcompress encode`: check a request, plan the dataset, and encode it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flcompress.data.captions import check_prompt, name_remarks, read_captions, read_prompts, videos_without_caption
from flcompress.data.encoder import Encoder, Skipped
from flcompress.data.index import INDEX_FILE, NEGATIVE, SKIPPED_FILE, WORK, Index
from flcompress.data.launched import follow, leading
from flcompress.data.making import clean, make, remake_damaged, store_plan, stored_plan, stored_request
from flcompress.data.planning import plan_clips, plan_prompts
from flcompress.data.sizes import OWN_SIZE, Size, Target
from flcompress.data.workers import Runner, workers
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.world import World
from flcompress.errors import DataError, RequestError
from flcompress.files import lines_of, locked, sha256, working_alone
from flcompress.models.configs import check_transformer_config
from flcompress.models.families import family_of
from flcompress.models.folder import check_pipeline
from flcompress.models.latent_size import folder_grid
from flcompress.models.parts import part_names
from flcompress.models.stock_files import folder_digest
from flcompress.progress import Display

_REPORTED_IN_FULL = ("max_sequence_length", "fps", NEGATIVE)
"""Keys of a request whose two values an error shows; other differences are only named."""
TIMEOUT_SECONDS = 1800.0
"""How long a process may take for one shard, or for measuring a few videos, before all are ended as hung."""
_VIDEOS_AT_ONCE = 32
"""Videos that a worker measures per task."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Parameters of one `flcompress encode`.

    Attributes:
        index: `model_index.json` of the pipeline whose text encoders and autoencoder are used.
        components: folders of its parts, and of its transformer.
        captions: file of captions, or of prompts.
        out: folder of the dataset.
        videos: folder of the videos; None for prompts only.
        target: size of the clips.
        fps: frame rate of the clips in frames per second; None keeps every frame.
        max_sequence_length: tokens that every prompt is padded to.
        negative_prompt: negative prompt of guidance.
        processes: number of worker processes.
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
        """Return everything that decides the dataset's contents; no paths."""
        videos = None
        if self.videos is not None:
            listed = [(file, (self.videos / file).stat().st_size) for file in sorted(files)]
            videos = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return {
            "pipeline": self.index["_class_name"],
            "parts": parts_digests(self.index, self.components),
            "captions": sha256(self.captions),
            "videos": videos,
            "target": asdict(self.target),
            "fps": self.fps,
            "max_sequence_length": self.max_sequence_length,
            **({NEGATIVE: self.negative_prompt} if self.negative_prompt else {}),
        }


def parts_digests(index: Mapping[str, Any], components: Mapping[str, Path]) -> dict[str, str]:
    """Return the SHA-256 of every encoding part of a pipeline, and how its transformer takes a first frame."""
    digests = {name: folder_digest(components[name]) for name in part_names(index)}
    family = family_of(index["_class_name"])
    if index["_class_name"] in family.from_image:
        way = family.image_condition(check_transformer_config(components["transformer"]))
        digests |= {"transformer's image condition": way} if way else {}
    return digests


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
    """Return a request to encode with the parts of a pipeline folder, on a GPU if there is one.

    Args:
        pipeline: the folder.
        captions: see `Request`.
        out: see `Request`.
        videos: see `Request`.
        target: see `Request`.
        max_sequence_length: see `Request`.
        processes: see `Request`.
        pipeline_class: another stock pipeline class of the model's family than the one the folder names.
        fps: see `Request`.
        negative_prompt: see `Request`.
    """
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


def encode_launched(request: Request, display: Display) -> dict[str, Any]:
    """Encode the dataset with all processes that a launcher started, or as `encode` does if there is one.

    Returns:
        See `encode`; nothing in the processes that are not the main one.

    Raises:
        RequestError: several workers in each of several processes, or the processes cannot meet.
        DataError, FlcompressError, OSError: see `encode`.
    """
    launch = Launch.from_environment()
    if launch.size > 1 and request.processes > 1:
        raise RequestError(
            f"--workers: {request.processes} given, but the launcher started {launch.size} processes, which share the "
            "work; leave it out"
        )
    with join("local", TIMEOUT_SECONDS, request.device, launch) as world, world.propagating_failures():
        return encode(request, display, world=world)


def encode(request: Request, display: Display, *, wait: bool = False, world: World | None = None) -> dict[str, Any]:
    """Encode the dataset, or its missing shards.

    Args:
        request: what to encode.
        display: shows the progress.
        wait: wait for another command that works on the same folder, instead of raising RequestError.
        world: the processes that share the work; all of them call this. Default: this one alone.

    Returns:
        A summary: clips, prompts, buckets, skipped videos, shards, bytes, and how many shards this call encoded.
        Nothing in processes that are not the main one.

    Raises:
        DataError: unusable captions, videos or sizes; a folder that holds something else.
        FlcompressError: a worker was killed; the same command resumes.
        RequestError: a negative prompt that is no Unicode text.
        OSError: the disk is full, or `out` cannot be written.
    """
    world = world or World()
    if world.main:
        return _encode(request, display, world, wait=wait)
    follow(_encoder(request), world)
    return {}


def _encode(request: Request, display: Display, world: World, *, wait: bool) -> dict[str, Any]:
    """Plan the dataset, and encode it with all processes, of which this is the main one."""
    check_prompt("--negative-prompt", request.negative_prompt)
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
        target = target.fixed_to(grid)
        captioned, prompts = read_captions(request.captions, request.videos), []
        uncaptioned = videos_without_caption(request.videos, captioned)
        for remark in name_remarks(request.videos, captioned):
            display.line(f"{request.captions}: {remark}")
    identity = request.identity([*(clip.file for clip in captioned), *uncaptioned])
    _check_out(request.out, identity)
    encoder = _encoder(request)
    request.out.mkdir(parents=True, exist_ok=True)
    running = leading(encoder, world) if world.size > 1 else workers(encoder, request.processes)
    with _exclusive(request.out, wait, display), running as run:
        if (request.out / INDEX_FILE).exists():
            shards = remake_damaged(request.out, run, display)
        else:
            plan = stored_plan(request.out)
            if plan is None:
                if request.videos is None:
                    plan = plan_prompts(prompts, request.negative_prompt)
                else:
                    measured = _measure([clip.file for clip in captioned], run, display)
                    plan = plan_clips(captioned, measured, uncaptioned, target, grid, request.negative_prompt)
                store_plan(request.out, plan, identity)
            shards = make(request.out, plan, identity, run, display)
    clean(request.out)
    return summary(request.out, shards)


def _encoder(request: Request) -> Encoder:
    """Return the encoder of a request, whose target may be one that the model does not take: that is found before."""
    target = request.target
    if request.videos is not None:
        target = target.fixed_to(folder_grid(request.components["transformer"], request.components["vae"]))
    return Encoder(
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


def summary(out: Path, made: int) -> dict[str, Any]:
    """Return a dataset's contents as plain data; `made` is the number of shards encoded by this call."""
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


def summary_text(totals: dict[str, Any]) -> str:
    """Return a summary as text."""
    what = f"{totals['clips']:,} clips, " if totals["clips"] else ""
    lines = [
        f"{totals['out']}: {what}{totals['prompts']:,} prompts, {totals['shards']:,} shards, "
        f"{totals['bytes'] / 1e6:,.1f} MB"
    ]
    lines += [f"  {b['frames']} x {b['height']} x {b['width']}: {b['clips']:,} clips" for b in totals["buckets"]]
    if totals["skipped"]:
        lines.append(f"{totals['skipped']:,} videos skipped: {Path(totals['out']) / SKIPPED_FILE} says why")
    if not totals["made"]:
        lines.append("nothing to do: every shard is there and whole")
    return "\n".join(lines)


def _check_out(out: Path, identity: dict[str, Any]) -> None:
    """Raise DataError if `out` holds another dataset, or something else."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: a file, expected a folder; choose another --out")
    stored = stored_request(out)
    if stored is None:
        if out.is_dir() and any(path.name != WORK for path in out.iterdir()):
            raise DataError(f"{out}: not empty and no latent dataset (no {INDEX_FILE}); choose another --out")
        return
    for key in (*identity, *(key for key in stored if key not in identity)):
        there, requested = stored.get(key), identity.get(key)
        if there != requested:
            difference = f"{key}: {there} there, {requested} given" if key in _REPORTED_IN_FULL else f"other {key}"
            raise DataError(f"{out}: holds a dataset made from another request ({difference}); choose another --out")


def _measure(files: Sequence[str], run: Runner, display: Display) -> dict[str, Size | Skipped]:
    measured: dict[str, Size | Skipped] = {}
    groups = [tuple(files[start : start + _VIDEOS_AT_ONCE]) for start in range(0, len(files), _VIDEOS_AT_ONCE)]
    with display.stage("measuring videos") as progress:
        for sizes in run(Encoder.measure, groups):
            measured |= sizes
            progress(len(measured), len(files), {})
    return measured


@contextmanager
def _exclusive(out: Path, wait: bool, display: Display) -> Iterator[None]:
    """Lock the dataset's folder; if another process holds it, wait or raise RequestError."""
    if wait:
        with locked(out, wait=True):
            yield
    else:
        busy = f"{out}: another flcompress is encoding into this folder; wait for it"
        with working_alone(out, busy, display.line):
            yield
