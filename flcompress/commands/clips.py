"""Commands that make and judge clips with a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flcompress.commands.recipes import StrPath, open_run
from flcompress.errors import RequestError

if TYPE_CHECKING:
    from flcompress.progress import Display


def generate(
    run: StrPath,
    prompt: str | None = None,
    *,
    prompts: StrPath | None = None,
    backend: str = "torch",
    options: Mapping[str, Any] | None = None,
    out: StrPath | None = None,
    seed: int = 0,
    image: StrPath | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    frame_local: float | None = None,
    display: Display | None = None,
) -> Path:
    """Generate one clip with the exported student of a run, or one for each prompt of a file.

    Args:
        run: the run directory; its diffusers export holds text encoder and autoencoder.
        prompt: what the clip shows.
        prompts: instead, a `.txt` file with one prompt a line. Processes that a launcher started share them, and clips
            that `out` holds already stay.
        backend: name of what runs the denoiser: "torch", "compile", "onnx", "tensorrt", or of another installed one.
        options: of the backend, by name, such as {"provider": "cuda"}.
        out: `.gif`, `.mp4` or `.png` (frames in a row) to write, "clip.gif" by default; with `prompts` the folder of
            their clips, "clips" by default.
        seed: seed of all noise; the same seed gives the same clip, alone or of a file of prompts.
        image: first frame, for image-to-video models.
        fps: frames per second of the file; those of the run's data, or of the model's family, by default.
        negative_prompt: what guidance leads away from; the recipe's by default.
        frame_local: share of the parameters whose blocks attend within latent frames, with the backend "torch": those
            that the run's temporal-attention pass found to attend least to other frames.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        The file that was written, or the folder.

    Raises:
        UnavailableError: the backend cannot run on this machine.
        RequestError: a missing or damaged export, or another model's; an `out` that cannot be written; no such backend;
            `frame_local` with another backend, or of a run without that pass.
    """
    from flcompress.distributed.launch import use_free_cores
    from flcompress.progress import default_display
    from flcompress.runtime.generate import generate
    from flcompress.runtime.generate_all import generate_all

    if (prompt is None) == (prompts is None):
        given = "both" if prompt is not None else "neither"
        raise RequestError(f"generate: {given} of --prompt and --prompts given, expected one of them")
    use_free_cores()
    display = display or default_display()
    if prompts is not None:
        if image is not None:
            raise RequestError(
                f"--image: {image} given with --prompts, whose clips start from text alone; leave it out"
            )
        where, file = Path(out or "clips"), Path(prompts)
        return generate_all(Path(run), file, backend, where, seed, display, fps, negative_prompt, options, frame_local)
    assert prompt is not None
    where, first = Path(out or "clip.gif"), Path(image) if image is not None else None
    with display.stage("generate") as progress:
        return generate(
            Path(run), prompt, backend, where, seed, first, progress, fps, negative_prompt, options, frame_local
        )


def evaluate(
    run: StrPath,
    *,
    suite: str | None = None,
    clips_per_prompt: int | None = None,
    seeds: int | None = None,
    prompts: StrPath | None = None,
    images: StrPath | None = None,
    against: Sequence[StrPath] = (),
    backends: Sequence[str] = (),
    guidances: Sequence[tuple[float, float]] = (),
    stages: bool | None = None,
    frame_local: float | None = None,
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    dry_run: bool = False,
    model: StrPath | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Compare teacher, stages and student of a run on held-out prompts, and write `RUN/eval`.

    Args:
        run: the run directory.
        suite: one of `flcompress.core.registry.known_suites`; by default moving-digits for its runs, or proxies.
        clips_per_prompt: clips of each prompt for each seed; the recipe's `evaluation.clips_per_prompt` by default.
        seeds: repetitions; the recipe's `evaluation.seeds` by default.
        prompts: text file of prompts, one a line; the data's held-out ones by default.
        images: folder of first frames, for image-to-video models.
        against: runs, stock pipeline folders, or YAML files that name one, to compare with.
        backends: names of what else runs the student, as for `generate`; each is judged beside torch's.
        guidances: (b1, b2) at which the teacher is judged too, with text guidance b1 and b2 away from its pruned self.
        stages: whether the pruned model without training and Stage II's are judged, each at all of the teacher's steps;
            the recipe's `evaluation.stages` by default.
        frame_local: share of the parameters: one more contender is the run's result with attention within latent frames
            in the blocks that its temporal-attention pass found to attend least to other frames.
        options: of the backends, by name; each goes to every backend that has it.
        own: options of the suite alone: sample, vbench_python and vbench_repo of vbench-i2v, features of fvd.
        dry_run: count the network calls and the hours, and do nothing.
        model: the model folder that the run started from, if it has moved.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        What the suite's `results.json` below `RUN/eval` holds; of a dry run, the counts.

    Raises:
        RequestError: an unfinished run, another dataset, too few seeds or clips, a backend that is not exported.
        UnavailableError: a backend cannot run on this machine.
    """
    from flcompress.core.registry import find_suite
    from flcompress.core.suites import SuiteRequest
    from flcompress.distributed.launch import use_free_cores
    from flcompress.progress import default_display
    from flcompress.runtime.backends.options import choose_backends

    if suite is None:
        data = open_run(run, model).recipe().data
        suite = "moving-digits" if data is not None and data.moving_digits is not None else "proxies"
    request = SuiteRequest(
        run=Path(run),
        display=display or default_display(),
        model=Path(model) if model is not None else None,
        clips_per_prompt=clips_per_prompt,
        seeds=seeds,
        prompts=Path(prompts) if prompts is not None else None,
        images=Path(images) if images is not None else None,
        against=tuple(map(Path, against)),
        backends=tuple(choose_backends(backends, options)),
        guidances=tuple(guidances),
        stages=stages,
        frame_local=frame_local,
        dry_run=dry_run,
        own=own or {},
    )
    use_free_cores()
    return find_suite(suite)().run(request)


def bench(
    run: StrPath,
    *,
    rounds: int = 5,
    size: str | None = None,
    batch: int = 1,
    backends: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
    model: StrPath | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Time teacher and student of a run side by side, and write `RUN/bench`.

    Args:
        run: the run directory.
        rounds: interleaved repetitions.
        size: FRAMESxHEIGHTxWIDTH of the clips, in pixels; the run's own by default.
        batch: clips generated at once.
        backends: names of what to time in addition to torch eager, as for `generate`; by default all that can.
        options: of the backends, by name; each goes to every backend that has it.
        model: the model folder that the run started from, if it has moved.
        display: where progress is shown; bars on a terminal, else lines.

    Returns:
        What `RUN/bench/results.json` holds.

    Raises:
        RequestError: an unfinished run, a size that the model does not take, a backend that cannot run it.
    """
    from flcompress.evaluation import bench as room
    from flcompress.progress import default_display

    pixels = room.read_size(size) if size else None
    with (display or default_display()).stage("bench") as progress:
        opened = open_run(run, model)
        return room.bench(opened, rounds, progress, backends, size=pixels, batch=batch, options=options)
