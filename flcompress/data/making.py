"""Make the shards of a planned latent dataset: go on after a kill, mend what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flcompress.data.encoder import ClipTask, Encoder, Made, PromptTask, Skipped
from flcompress.data.index import INDEX_FILE, SKIPPED_FILE, WORK, ClipShard, Index, PromptShard, damaged
from flcompress.data.planning import Plan
from flcompress.data.workers import Run
from flcompress.errors import DataError
from flcompress.files import lines_of, write_text
from flcompress.progress import Display

_PLAN_FILE, _DONE_FILE = "plan.json", "done.jsonl"
_PLAN, _MADE = TypeAdapter(Plan), TypeAdapter(Made)


def store_plan(out: Path, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Keep the plan of a dataset that is begun, with what identifies its request."""
    (out / WORK).mkdir(exist_ok=True)
    stored = {"request": identity, "plan": _PLAN.dump_python(plan, mode="json")}
    write_text(out / WORK / _PLAN_FILE, json.dumps(stored) + "\n")


def stored_request(out: Path) -> dict[str, Any] | None:
    """What identifies the request of the dataset in a folder, finished or begun; None where there is none."""
    if (out / INDEX_FILE).exists():
        return Index.read(out).request
    path = out / WORK / _PLAN_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))["request"]) if path.exists() else None


def stored_plan(out: Path) -> Plan | None:
    """The plan of a dataset that is begun."""
    path = out / WORK / _PLAN_FILE
    if not path.exists():
        return None
    return _PLAN.validate_python(json.loads(path.read_text(encoding="utf-8"))["plan"])


def _done(out: Path) -> dict[str, Made]:
    """What is made so far, by task; shards that are no longer whole are left out."""
    path = out / WORK / _DONE_FILE
    found = {}
    for line in lines_of(path.read_text(encoding="utf-8")) if path.exists() else ():
        try:
            made = _MADE.validate_json(line)
        except ValidationError:
            continue  # a killed attempt can leave half a line
        found[made.task] = made
    for shard in damaged(out, [made.shard for made in found.values() if made.shard is not None]):
        del found[shard.file]
    return found


def make(out: Path, plan: Plan, identity: Mapping[str, Any], run: Run, display: Display) -> int:
    """Make the plan's shards that are not done yet, and finish the dataset; returns how many were made."""
    done = _done(out)
    left = [task for task in plan.tasks if task.file not in done]
    total = sum(task.size for task in plan.tasks)
    sizes = {task.file: task.size for task in plan.tasks}
    ready, skipped = total - sum(task.size for task in left), sum(len(made.skipped) for made in done.values())
    with (out / WORK / _DONE_FILE).open("a", encoding="utf-8") as file, display.stage("encoding") as progress:
        file.write("\n")  # a killed attempt can leave half a line
        for made in run(Encoder.make, left):
            done[made.task] = made
            file.write(_MADE.dump_json(made).decode() + "\n")
            file.flush()
            ready, skipped = ready + sizes[made.task], skipped + len(made.skipped)
            progress(ready, total, {"skipped": skipped})
    _finish(out, plan, identity, [done[task.file] for task in plan.tasks])
    return len(left)


def _finish(out: Path, plan: Plan, identity: Mapping[str, Any], made: Sequence[Made]) -> None:
    """Write the list of skipped videos and the index, the last thing of a dataset."""
    skipped = sorted([*plan.skipped, *(one for part in made for one in part.skipped)], key=lambda one: one.file)
    clips = tuple(part.shard for part in made if isinstance(part.shard, ClipShard))
    if identity["videos"]:
        _write_skipped(out, skipped)
        if not clips:
            raise DataError(f"{out}: no clip could be encoded; {out / SKIPPED_FILE} says why, video by video")
    Index(
        request=dict(identity),
        prompts=plan.prompts,
        prompt_shards=tuple(part.shard for part in made if isinstance(part.shard, PromptShard)),
        clip_shards=clips,
    ).write(out)


def _write_skipped(out: Path, skipped: Sequence[Skipped]) -> None:
    write_text(out / SKIPPED_FILE, "".join(json.dumps(asdict(one)) + "\n" for one in skipped))


def mend(out: Path, run: Run, display: Display) -> int:
    """Make the damaged shards of a finished dataset again; returns how many."""
    index = Index.read(out)
    tasks: list[PromptTask | ClipTask] = []
    first = 0
    for shard in index.prompt_shards:
        tasks.append(PromptTask(shard.file, index.prompts[first : first + shard.prompts]))
        first += shard.prompts
    for held in index.clip_shards:
        tasks.append(ClipTask(held.file, held.size, held.clips, tuple(index.prompts[one.prompt] for one in held.clips)))
    broken = {shard.file for shard in damaged(out, index.shards)}
    left = [task for task in tasks if task.file in broken]
    again: dict[str, PromptShard | ClipShard] = {}
    with display.stage("encoding damaged shards again") as progress:
        for made in run(Encoder.make, left):
            if made.skipped or made.shard is None:
                worst = made.skipped[0]
                raise DataError(
                    f"{out / made.task}: cannot be made again: {worst.file}: {worst.reason}, though it was encoded "
                    "once; put the same video back, or encode into a new folder"
                )
            again[made.task] = made.shard
            progress(len(again), len(left), {})
    if again:
        update = {
            "prompt_shards": tuple(again.get(shard.file, shard) for shard in index.prompt_shards),
            "clip_shards": tuple(again.get(shard.file, shard) for shard in index.clip_shards),
        }
        index.model_copy(update=update).write(out)
    return len(again)


def clean(out: Path) -> None:
    """Remove what only an unfinished dataset needs, and what a killed attempt left."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in out.glob(".*.tmp"):
        path.unlink()
