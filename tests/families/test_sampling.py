"""Our sampler over a family's adapter gives what the stock pipeline gives: arguments, signs, levels, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flcompress.diffusion.contract import SamplingContract, contract_of, levels_of, scheduler_of
from flcompress.diffusion.network import Conditioning, select
from flcompress.diffusion.sampling import sample
from flcompress.diffusion.student import student_contract
from flcompress.models.configs import read_json
from flcompress.models.families import family_of
from flcompress.models.latent_size import grid_of
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network
from flcompress.models.parts import open_parts
from tests.families.pipelines import TINY
from tests.fixtures.rounding import require_rounded
from tests.training.comparing import FORWARD

pytestmark = pytest.mark.e2e

PROMPT, LENGTH = "a three drifting up and left, fast", 16


def contracts(folder: Path, name: str) -> tuple[SamplingContract, SamplingContract]:
    """(teacher in 5 steps, student in 4), neither of them noising again."""
    tiny = TINY[name]
    index = read_json(folder / "model_index.json", "")
    family, config = family_of(index["_class_name"]), read_json(folder / "transformer" / "config.json", "")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "")
    shape = grid_of(config, read_json(folder / "vae" / "config.json", "")).latents(*tiny.size)
    teacher = contract_of(
        scheduler,
        num_inference_steps=5,
        guidance_scale=tiny.guidance,
        max_sequence_length=LENGTH,
        embedded_guidance=tiny.embedded,
        pipeline_sigmas=family.sigmas,
        mu=family.mu(scheduler, config, shape),
    )
    return teacher, student_contract(teacher, 4, family.sigmas)


def stock(
    folder: Path, contract: SamplingContract, name: str, noise: torch.Tensor, image: Any, own: bool
) -> torch.Tensor:
    """Latents of the stock pipeline from the given starting noise, in the canonical layout.

    With `own`, by the scheduler that it loads from the folder; else by the contract's.
    """
    import diffusers
    from diffusers import CogVideoXDDIMScheduler

    index = read_json(folder / "model_index.json", "")
    family = family_of(index["_class_name"])
    pipeline = getattr(diffusers, index["_class_name"]).from_pretrained(str(folder), use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    if not own:
        pipeline.scheduler = scheduler_of(contract)
    if contract.replaces_steps:  # CogVideoX's DPM adds noise; its ODE is that of the other one
        pipeline.scheduler = CogVideoXDDIMScheduler.from_config(dict(contract.scheduler))
    frames, height, width = TINY[name].size
    size: dict[str, Any] = {"height": height, "width": width} | ({} if family.image else {"num_frames": frames})
    given = {"image": image} if image is not None else {}
    if name in ("flux", "qwen-image"):
        from flcompress.models.families.conversions import pack, unpack

        start: torch.Tensor = pack(noise)
    elif name == "ltx":
        start = noise.flatten(2).transpose(1, 2)
    elif name.startswith("cogvideox"):
        start = noise.transpose(1, 2)
    else:
        start = noise[:, :, 0] if family.image else noise
    if name == "qwen-image":
        # The stock pipeline rescales guided predictions, which we do not follow; a student is not guided.
        given["negative_prompt"] = ""
    found: torch.Tensor = pipeline(
        prompt=PROMPT,
        num_inference_steps=contract.num_inference_steps,
        max_sequence_length=LENGTH,
        latents=start,
        output_type="latent",
        return_dict=False,
        **family.call(contract.guidance_scale, contract.embedded_guidance) | size | given,
    )[0]
    assert levels_of(pipeline.scheduler) == (contract.sigmas, contract.timesteps)
    if name in ("flux", "qwen-image"):
        return unpack(found, noise)
    if name == "ltx":
        return found.transpose(1, 2).reshape(noise.shape)
    if name.startswith("cogvideox"):
        return found.transpose(1, 2)
    return found[:, :, None] if family.image else found


def require_same(folder: Path, name: str, contract: SamplingContract, own: bool = False) -> None:
    """Sample by the stock pipeline and by our sampler, and once more by ours with predictions a tenth too long."""
    from PIL import Image

    parts = open_parts(folder)
    config = read_json(folder / "transformer" / "config.json", "")
    shape = grid_of(config, read_json(folder / "vae" / "config.json", "")).latents(*TINY[name].size)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(1, parts.family.channels(config), *shape, generator=draw)
    prompts = parts.encode_prompts([PROMPT, ""], LENGTH)
    given, image = select(prompts, slice(0, 1)), None
    if parts.from_image:
        frames, height, width = TINY[name].size
        pixels = (torch.rand(height, width, 3, generator=draw) * 255).byte()
        image = Image.fromarray(pixels.numpy())
        clip = (pixels.permute(2, 0, 1).float() / 127.5 - 1.0)[None, :, None].expand(1, 3, frames, height, width)
        given |= parts.encode_images(clip, [PROMPT], LENGTH)
    network = as_network(load_transformer(folder / "transformer"), contract.embedded_guidance)

    def wrong(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return 1.1 * network(x, timestep, conditioning)

    start, negative = parts.family.start(noise, given), select(prompts, slice(1, 2))
    ours, planted = (
        parts.family.end(config, sample(one, contract, start, given, negative), given) for one in (network, wrong)
    )
    theirs = stock(folder, contract, name, noise, image, own)
    if name == "hunyuan-video-i2v-concat":
        ours, planted = ours[:, :, 1:], planted[:, :, 1:]  # the pipeline keeps back the first latent frame
    assert ours.shape == theirs.shape
    require_rounded(ours, theirs, contract.evaluations * FORWARD, planted=planted)


@pytest.mark.parametrize("name", [name for name in TINY if name != "qwen-image"])
def test_the_teacher_is_sampled_as_its_stock_pipeline_samples_it(
    pipeline_folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    certain_autoencoder(monkeypatch)
    teacher, _ = contracts(pipeline_folder(name), name)
    require_same(pipeline_folder(name), name, teacher, own=True)


@pytest.mark.parametrize("name", TINY)
def test_the_student_is_sampled_as_its_stock_pipeline_samples_it(
    pipeline_folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    certain_autoencoder(monkeypatch)
    _, student = contracts(pipeline_folder(name), name)
    assert student.guidance_scale == 1.0
    assert student.sigmas[0] == pytest.approx(1.0)
    config = {**dict(student.scheduler), "stochastic_sampling": False}
    quiet = replace(student, scheduler=tuple(sorted(config.items())))
    require_same(pipeline_folder(name), name, quiet if student.stochastic else student)


@pytest.mark.parametrize("name", TINY)
def test_sizes_go_through_the_autoencoder_and_back(pipeline_folder: Callable[[str], Path], name: str) -> None:
    folder = pipeline_folder(name)
    grid = grid_of(*(read_json(folder / part / "config.json", "") for part in ("transformer", "vae")))
    shape = grid.latents(*TINY[name].size)
    assert grid.clip(shape) == TINY[name].size
    parts = open_parts(folder)
    frames, height, width = TINY[name].size
    draw = torch.Generator().manual_seed(0)
    clips = torch.rand(2, 3, frames, height, width, generator=draw) * 2.0 - 1.0
    latents, given = parts.encode_clips(clips), parts.encode_images(clips, [PROMPT, ""], LENGTH)
    assert latents.shape[2:] == shape
    assert all(len(tensor) == 2 for tensor in given.values())
    assert bool(given) == parts.from_image
    shown = 5 if name == "hunyuan-video-i2v-concat" else frames  # its pipeline cuts off four
    assert parts.decode_latents(latents).shape == (2, 3, shown, height, width)


@pytest.mark.parametrize("name", [name for name in TINY if name.endswith(("i2v", "concat", "replace"))])
def test_a_first_frame_conditions_alone(pipeline_folder: Callable[[str], Path], name: str) -> None:
    """Training shows it with a moving clip behind it, sampling by itself: nothing may depend on what follows."""
    parts = open_parts(pipeline_folder(name))
    frames, height, width = TINY[name].size
    draw = torch.Generator().manual_seed(0)
    moving = torch.rand(1, 3, frames, height, width, generator=draw) * 2.0 - 1.0
    still = moving[:, :, :1].expand_as(moving)
    of_clip, of_image = (parts.encode_images(clip, [PROMPT], LENGTH) for clip in (moving, still))
    assert of_clip.keys() == of_image.keys()
    assert all(torch.equal(of_clip[key], of_image[key]) for key in of_clip)


def certain_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVideoX's pipeline draws the image latents at random; here the posterior's mode stands for a draw."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
