"""Encode the shards of a planned latent dataset: resume after a kill, remake damaged shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flcompress.data.encoder import ClipTask, Encoder, PromptTask, ShardResult, Skipped
from flcompress.data.index import INDEX_FILE, SKIPPED_FILE, WORK, ClipShard, Index, PromptShard, damaged_shards
from flcompress.data.launched import DONE_FILES, RESULT
from flcompress.data.planning import DatasetPlan
from flcompress.data.workers import Runner
from flcompress.errors import DataError
from flcompress.files import TEMPORARY, lines_of, write_text
from flcompress.progress import Display

_PLAN_FILE, _DONE_FILE = "plan.json", "done.jsonl"
_PLAN = TypeAdapter(DatasetPlan)


def store_plan(out: Path, plan: DatasetPlan, identity: Mapping[str, Any]) -> None:
    """Store the plan of an unfinished dataset, with the identity of its request."""
    (out / WORK).mkdir(exist_ok=True)
    stored = {"request": identity, "plan": _PLAN.dump_python(plan, mode="json")}
    write_text(out / WORK / _PLAN_FILE, json.dumps(stored) + "\n")


def stored_request(out: Path) -> dict[str, Any] | None:
    """Return the identity of the request of a dataset, finished or not; None if the folder holds none."""
    if (out / INDEX_FILE).exists():
        return Index.read(out).request
    path = out / WORK / _PLAN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))["request"]) if path.exists() else None


def stored_plan(out: Path) -> DatasetPlan | None:
    """Return the stored plan of an unfinished dataset, or None."""
    path = out / WORK / _PLAN_FILE
    if not path.exists():
        return None
    return _PLAN.validate_python(json.loads(path.read_text(encoding="utf-8"))["plan"])


def _finished_shards(out: Path) -> dict[str, ShardResult]:
    """Return the results so far, by task, without those of damaged shards."""
    results = {}
    for path in sorted((out / WORK).glob(DONE_FILES)):
        for line in lines_of(path.read_text(encoding="utf-8")):
            try:
                result = RESULT.validate_json(line)
            except ValidationError:
                continue  # a killed attempt can leave half a line
            results[result.task] = result
    for shard in damaged_shards(out, [result.shard for result in results.values() if result.shard is not None]):
        del results[shard.file]
    return results


def make(out: Path, plan: DatasetPlan, identity: Mapping[str, Any], run: Runner, display: Display) -> int:
    """Encode the remaining shards of a plan, finish the dataset, and return the number encoded."""
    done = _finished_shards(out)
    remaining = [task for task in plan.tasks if task.file not in done]
    total = sum(task.size for task in plan.tasks)
    sizes = {task.file: task.size for task in plan.tasks}
    finished = total - sum(task.size for task in remaining)
    skipped = sum(len(result.skipped) for result in done.values())
    with (out / WORK / _DONE_FILE).open("a", encoding="utf-8") as file, display.stage("encoding") as progress:
        file.write("\n")  # a killed attempt can leave half a line
        for result in run(Encoder.make, remaining):
            done[result.task] = result
            file.write(RESULT.dump_json(result).decode() + "\n")
            file.flush()
            finished, skipped = finished + sizes[result.task], skipped + len(result.skipped)
            progress(finished, total, {"skipped": skipped})
    _finish(out, plan, identity, [done[task.file] for task in plan.tasks])
    return len(remaining)


def _finish(out: Path, plan: DatasetPlan, identity: Mapping[str, Any], results: Sequence[ShardResult]) -> None:
    """Write the list of skipped videos, and then the index, whose presence marks a finished dataset."""
    skipped = sorted(
        [*plan.skipped, *(video for result in results for video in result.skipped)], key=lambda video: video.file
    )
    clips = tuple(result.shard for result in results if isinstance(result.shard, ClipShard))
    if identity["videos"]:
        _write_skipped(out, skipped)
        if not clips:
            raise DataError(f"{out}: no clip could be encoded; {out / SKIPPED_FILE} says why, video by video")
    Index(
        request=dict(identity),
        prompts=plan.prompts,
        prompt_shards=tuple(result.shard for result in results if isinstance(result.shard, PromptShard)),
        clip_shards=clips,
    ).write(out)


def _write_skipped(out: Path, skipped: Sequence[Skipped]) -> None:
    write_text(out / SKIPPED_FILE, "".join(json.dumps(asdict(video)) + "\n" for video in skipped))


def remake_damaged(out: Path, run: Runner, display: Display) -> int:
    """Encode the damaged shards of a finished dataset anew, and return their number."""
    index = Index.read(out)
    tasks: list[PromptTask | ClipTask] = []
    first = 0
    for shard in index.prompt_shards:
        tasks.append(PromptTask(shard.file, index.prompts[first : first + shard.prompts]))
        first += shard.prompts
    for clips_shard in index.clip_shards:
        tasks.append(
            ClipTask(
                clips_shard.file,
                clips_shard.size,
                clips_shard.clips,
                tuple(index.prompts[clip.prompt] for clip in clips_shard.clips),
            )
        )
    broken = {shard.file for shard in damaged_shards(out, index.shards)}
    remaining = [task for task in tasks if task.file in broken]
    remade: dict[str, PromptShard | ClipShard] = {}
    with display.stage("encoding damaged shards again") as progress:
        # In the layout of the dataset, so that its bytes, and with them the index, stay as they were.
        again = Encoder.make if index.version > 1 else Encoder.make_as_version_1
        for result in run(again, remaining):
            if result.skipped or result.shard is None:
                video = result.skipped[0]
                raise DataError(
                    f"{out / result.task}: cannot be made again: {video.file}: {video.reason}, though it was encoded "
                    "once; put the same video back, or encode into a new folder"
                )
            remade[result.task] = result.shard
            progress(len(remade), len(remaining), {})
    if remade:
        update = {
            "prompt_shards": tuple(remade.get(shard.file, shard) for shard in index.prompt_shards),
            "clip_shards": tuple(remade.get(shard.file, shard) for shard in index.clip_shards),
        }
        index.model_copy(update=update).write(out)
    return len(remade)


def clean(out: Path) -> None:
    """Remove the files of an unfinished dataset, and leftovers of a killed attempt."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in out.glob(f"*{TEMPORARY}"):
        path.unlink()
