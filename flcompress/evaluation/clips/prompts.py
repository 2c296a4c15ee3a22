"""What an evaluation's clips are made from: prompts and first frames that no pass of the run was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flcompress.core.program import Program
from flcompress.core.suites import SuiteRequest
from flcompress.data.captions import check_prompt, read_prompts
from flcompress.data.dataset import LatentDataset
from flcompress.data.pictures import BrokenPicture, open_picture
from flcompress.draws import generator
from flcompress.driver.clips import Clips
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.frontend.recipe import Recipe
from flcompress.models.parts import Parts
from flcompress.moving_digits import digits
from flcompress.runtime.clip_files import pixels_of
from flcompress.runtime.clip_folder import Item

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

HELD_OUT_CLIPS = 128
"""Most clips that prompts are taken from."""

REAL_CLIPS = 256
"""Most real clips that figures are compared with."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """The prompts of an evaluation, and real clips.

    Attributes:
        items: distinct prompts with their images.
        data: the held-out clips of the run's data; None for prompts of a file and for the embedded benchmark.
        benchmark: whether real clips are those of the embedded benchmark.
        note: one line on where the prompts come from.
    """

    items: tuple[Item, ...]
    data: LatentDataset | None = None
    benchmark: bool = False
    note: str = ""

    def real_clips(self, parts: Parts, latents: tuple[int, int, int, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (caption, clip [3, frames, height, width]) of held-out real clips, at the size that models sample."""
        if self.benchmark:
            captions = (digits.captions("heldout") * (REAL_CLIPS // 32))[:REAL_CLIPS]
            clips = digits.render(captions, "heldout", generator("evaluation", "real clips"))
            yield from zip((caption.text for caption in captions), clips, strict=True)
        elif self.data is not None:
            for latent, caption in self.data.in_order(REAL_CLIPS):
                if latent.shape[1:] == torch.Size(latents):
                    yield caption, parts.decode_latents(latent)[0].float().cpu()


def read_material(request: SuiteRequest, run: RunDirectory, program: Program, device: str, frames: Path) -> Material:
    """Return the prompts of an evaluation: those of a file, or of the part of the run's data that is held out.

    Args:
        request: what was asked for.
        run: the run.
        program: its last program; whether it starts from an image decides what each prompt needs.
        device: where real clips are decoded.
        frames: folder for the first frames of held-out clips.

    Raises:
        RequestError: nothing to evaluate with; the message says what to pass.
    """
    from_image = program.pipeline_class in program.family.from_image
    if request.images is not None and not from_image:
        raise RequestError(
            f"--images: {request.images} given, but a {program.pipeline_class} starts from text alone; leave it out"
        )
    if request.prompts is not None:
        prompts = _read(request.prompts)
        if not from_image:
            return Material(items=tuple(Item(prompt=prompt) for prompt in prompts), note=f"{request.prompts}")
        if request.images is None:
            raise RequestError(
                f"--prompts: {request.prompts} given without --images; a {program.pipeline_class} makes a clip from "
                "its first frame: give a folder with one picture for each prompt, in the order of their names"
            )
        pictures = read_pictures(request.images)
        if len(pictures) != len(prompts):
            raise RequestError(
                f"--images: {len(pictures)} pictures in {request.images}, but {len(prompts)} distinct prompts in "
                f"{request.prompts}; expected one for each, in the order of their names"
            )
        items = tuple(Item(prompt=prompt, image=image) for prompt, image in zip(prompts, pictures, strict=True))
        return Material(items=items, note=f"{request.prompts}")
    if request.images is not None:
        raise RequestError(f"--images: {request.images} given without --prompts; give the file of their prompts")
    return _held_out(request, run, program, device, frames, from_image=from_image)


def _read(path: Path) -> list[str]:
    prompts = read_prompts(path)
    for number, prompt in enumerate(prompts, start=1):
        check_prompt(f"{path}: prompt {number}", prompt)
    return prompts


def read_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder, by name.

    Raises:
        RequestError: there are none, or one cannot be read; the message names it.
    """
    if not folder.is_dir():
        raise RequestError(f"--images: {folder}: no such folder; expected one of pictures")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise RequestError(f"--images: {folder}: no pictures; expected {', '.join(PICTURES)}")
    for path in pictures:
        try:
            open_picture(path)
        except BrokenPicture as error:
            raise RequestError(f"{path}: {error}") from error
    return pictures


def _held_out(
    request: SuiteRequest, run: RunDirectory, program: Program, device: str, frames: Path, *, from_image: bool
) -> Material:
    """Return the prompts, and for image models the first frames, of the clips that no pass was trained on."""
    recipe = run.recipe()
    fix = "give --prompts FILE" + (" and --images FOLDER" if from_image else "")
    if recipe.data is None:
        raise RequestError(f"{run.path}: its recipe has no data, so there are no held-out prompts; {fix}")
    if recipe.data.moving_digits is not None:
        items = tuple(Item(prompt=caption.text) for caption in digits.captions("heldout"))
        return Material(items=items, benchmark=True, note="the benchmark's held-out prompts")
    shared = run.final_folder.parents[1]
    data = Clips(recipe, shared / "data", request.display, device)(program)
    if data.prompts_only:
        raise RequestError(
            f"{data.folder}: a dataset of {len(data.captions) - data.captions_start} prompts, all of which trainings "
            f"read, so none is held out; {fix}"
        )
    kept = held_out_clips(recipe, len(data))
    if not 0 < kept < len(data):
        raise RequestError(f"{data.folder}: {len(data)} clips, none of which every pass of {run.path} holds out; {fix}")
    held_out = data.split(kept)[1]
    if not from_image:
        captions = dict.fromkeys(caption for _, caption in held_out.in_order(kept, latents=False))
        items = tuple(Item(prompt=caption) for caption in captions)
    else:
        items = tuple(_first_frames(held_out, program.parts(device), frames))
    return Material(items=items, data=held_out, note=f"the last {kept} of {len(data)} clips, which no pass trained on")


def held_out_clips(recipe: Recipe, clips: int) -> int:
    """Return how many of the last clips of a dataset no pass of a recipe trains on, a quarter of them at most."""
    most = min(HELD_OUT_CLIPS, max(1, clips // 4))
    return min([most, *(step.held_out(clips, recipe.training) for step in recipe.passes)])


def _first_frames(data: LatentDataset, parts: Parts, folder: Path) -> Iterator[Item]:
    """Write the first frames of clips as pictures; yield each with its caption."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number, (latents, caption) in enumerate(data.in_order(len(data))):
        path = folder / f"{number:05d}.png"
        if not path.is_file():
            Image.fromarray(pixels_of(parts.decode_latents(latents)[0, :, :1])[0]).save(path)
        yield Item(prompt=caption, image=path)
