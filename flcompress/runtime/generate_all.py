"""Generate a clip for every prompt of a file, on all processes that a launcher started; a killed command resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flcompress.core.backend import Backend
from flcompress.core.program import FACTS_FILE
from flcompress.core.records import ClipsFile, ExportFile
from flcompress.core.settings import Training
from flcompress.data.captions import check_prompt, read_prompts
from flcompress.diffusion.network import CallCounter, Conditioning
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.world import World
from flcompress.errors import RequestError
from flcompress.files import TEMPORARY, sha256, working_alone
from flcompress.progress import Display, QuietDisplay
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.clip_folder import ClipFolder, Item, clip_name
from flcompress.runtime.generate import Student, encode_prompt, exported_contract, open_student, sample_clip
from flcompress.runtime.torch_session import best_device

FOLDER_FILE = "clips.json"
GROUP = 256
"""Prompts that a process encodes before it samples their clips: 2 GB of embeddings of 512 tokens."""


def generate_all(
    run_dir: Path,
    prompts: Path,
    backend: str,
    out: Path,
    seed: int,
    display: Display,
    fps: float | None = None,
    negative_prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
    frame_local: float | None = None,
) -> Path:
    """Generate the clips of all prompts of a file that `out` does not hold yet; the processes share them.

    Each is the clip that `generate` makes of the prompt at that seed.

    Args:
        run_dir: see `generate`.
        prompts: `.txt`, one prompt a line; each is taken once.
        backend: see `generate`.
        out: folder of the clips, h264 in `.mp4`; prompt and seed decide a name.
        seed: seed of the noise of every clip.
        display: where progress is shown.
        fps: see `generate`.
        negative_prompt: see `generate`.
        options: see `generate`.
        frame_local: see `generate`.

    Returns:
        `out`.

    Raises:
        DataError: no prompts.
        RequestError: `out` holds something else, or clips of another student, back end or negative prompt; a model that
            starts from a picture; and as `generate`.
        UnavailableError: see `generate`.
    """
    runner = choose_backend(backend, options)
    items = {clip_name(text, Item(prompt=text).key, seed, 0): Item(prompt=text) for text in read_prompts(prompts)}
    check_prompt("--negative-prompt", negative_prompt or "")
    runner.require()
    student = open_student(run_dir, runner, negative_prompt, frame_local)
    if student.parts.from_image:
        raise RequestError(
            f"--prompts: {prompts} given, but a {student.facts.pipeline_class} makes a clip from its first frame; give "
            "--prompt and --image, clip by clip"
        )
    made_by = _made_by(run_dir, runner, student, fps or student.frame_rate, frame_local)
    with (
        join("local", Training().timeout, best_device(), Launch.from_environment()) as world,
        world.propagating_failures(),
        _working_in(out, world, display),
    ):
        missing: list[str] = world.broadcast(lambda: _missing(out, made_by, list(items), display))
        mine = missing[world.rank :: world.size]
        with (display if world.main else QuietDisplay()).stage("generate") as progress:

            def show(done: int, total: int, values: Mapping[str, float]) -> None:
                progress(done, total, values)
                world.heartbeat()

            contract = exported_contract(student.facts)
            calls = CallCounter(show, contract.evaluations * len(mine))
            folder = ClipFolder(out, world.rank)
            for start in range(0, len(mine), GROUP):
                group = {name: items[name] for name in mine[start : start + GROUP]}
                _generate(student, group, folder, seed, made_by.frame_rate, calls, world)
        world.all_gather("generated")
    return out


def _generate(
    student: Student,
    items: Mapping[str, Item],
    folder: ClipFolder,
    seed: int,
    frame_rate: float,
    calls: CallCounter,
    world: World,
) -> None:
    """Encode the prompts, then sample and decode clip by clip."""
    parts, contract = student.parts, exported_contract(student.facts)
    student.let_go()
    encoded: dict[str, Conditioning] = {}
    for name, item in items.items():
        world.heartbeat(f"encoding the prompt of {name}")
        prompts = encode_prompt(parts, contract, item.prompt)
        encoded[name] = {key: value.cpu() for key, value in prompts.items()}
    parts.let_go()
    network = calls.around(student.network)
    for name, item in items.items():
        world.heartbeat(name)
        began = time.monotonic()
        latents = sample_clip(network, parts, student.facts, encoded.pop(name), seed)
        clip = parts.decode_latents(latents)[0].cpu()
        seconds = round(time.monotonic() - began, 3)
        folder.add(clip, frame_rate, file=name, item=item.key, prompt=item.prompt, seed=seed, number=0, seconds=seconds)


def _made_by(
    run_dir: Path, backend: Backend, student: Student, frame_rate: float, frame_local: float | None
) -> ClipsFile:
    exports = run_dir / "exports"
    record = ExportFile.read_optional(exports / f"{backend.export}.json")
    return ClipsFile(
        student=sha256(exports / "diffusers" / FACTS_FILE),
        export=(record.key or None) if record is not None else None,
        backend=backend.name,
        options=backend.model_dump(mode="json"),
        negative_prompt=student.facts.contract.negative_prompt,
        frame_rate=frame_rate,
        **({} if frame_local is None else {"frame_local": frame_local}),
    )


@contextmanager
def _working_in(out: Path, world: World, display: Display) -> Iterator[None]:
    """Make the folder, and let no other command work in it meanwhile; the main process holds the lock."""
    if not world.main:
        yield
        return
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: a file, expected a folder for the clips of --prompts; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out}: another flcompress is generating into this folder; wait for it or choose another --out"
    with working_alone(out, busy, display.line):
        yield


def _missing(out: Path, made_by: ClipsFile, names: Sequence[str], display: Display) -> list[str]:
    """Return the names of which no whole clip is there, once the folder is known to hold no others' clips.

    Raises:
        RequestError: it does.
    """
    file = out / FOLDER_FILE
    if not file.exists():
        if any(path.name != f"{FOLDER_FILE}{TEMPORARY}" for path in out.iterdir()):
            raise RequestError(
                f"{out}: not empty, and not of flcompress generate (no {FOLDER_FILE}); choose another --out"
            )
        made_by.write(file)
    there = ClipsFile.read(file)
    for key in ClipsFile.model_fields:
        before, asked = getattr(there, key), getattr(made_by, key)
        if before != asked:
            values = "" if key in ("student", "export") else f": {before!r} there, {asked!r} given"
            raise RequestError(f"{out}: holds clips of another {key.replace('_', ' ')}{values}; choose another --out")
    folder = ClipFolder(out)
    intact, known = folder.intact(names), folder.lines()
    lost = [name for name in names if name in known and name not in intact]
    if lost:
        display.line(
            f"{out}: {len(lost)} clips are missing or not as they were written ({lost[0]}); they are made again"
        )
    display.line(f"{out}: {len(intact)} of {len(names)} clips are there")
    return [name for name in names if name not in intact]
