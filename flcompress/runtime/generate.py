"""Generate a clip from a run's exports: prompt in, file out, by torch, ONNX Runtime or TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from flcompress.core.program import FACTS_FILE
from flcompress.core.records import ContractPart, FactsFile
from flcompress.data.captions import check_prompt
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.experts import COMPONENTS, OTHER
from flcompress.diffusion.network import Conditioning, Network, select, to_device
from flcompress.diffusion.sampling import sample
from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config, read_index
from flcompress.models.families import family_of
from flcompress.models.folder import check_parts
from flcompress.models.parts import Parts, open_parts
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.progress import ProgressSink
from flcompress.runtime import Backend, ExportBackend
from flcompress.runtime.clip_files import check_target, read_picture, write_clip
from flcompress.runtime.manifest import MANIFEST_FILE, PARTNER_FOLDER, read_manifest
from flcompress.runtime.onnx_session import require_onnxruntime
from flcompress.runtime.sessions import Export, TorchSession, best_device
from flcompress.runtime.tensorrt_session import require_gpu

Load = Callable[[], Network]
"""Brings a network into memory."""


def generate(
    run_dir: Path,
    prompt: str,
    backend: Backend,
    out: Path,
    seed: int = 0,
    image: Path | None = None,
    progress: ProgressSink | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
) -> Path:
    """Run the whole pipeline of `run_dir/exports` and write the clip.

    Args:
        run_dir: a run directory; every backend needs its diffusers export, for text encoder and autoencoder.
        prompt: what the clip is to show.
        backend: what runs the denoiser.
        out: .gif, .mp4 or .png (a strip of the frames).
        seed: seed of all noise; the same seed gives the same clip on every backend, within the export's tolerance. The
            noise is drawn as stock Wan draws it after `torch.manual_seed(seed)`; other pipelines draw other shapes.
        image: the first frame, for image-to-video models; scaled and cropped to the clip's size.
        progress: called after each denoising step.
        fps: frames a second of the file; the export's own rate by default.
        negative_prompt: what guidance leads away from; the recipe's by default.

    Returns:
        `out`.

    Raises:
        UnavailableError: the backend cannot run on this machine.
        RequestError: an export is missing, damaged or of another model; `out` cannot be written; a prompt that is no
            Unicode text.
    """
    check_prompt("--prompt", prompt)
    check_prompt("--negative-prompt", negative_prompt or "")
    check_target(out)
    if backend == "tensorrt":
        require_gpu()
    if backend == "onnx":
        require_onnxruntime("backend onnx")
    pipeline = run_dir / "exports" / "diffusers"
    facts = read_manifest(FactsFile, pipeline / FACTS_FILE, _make(run_dir, "diffusers"))
    check_parts(pipeline)
    facts = _with_negative(facts, negative_prompt)
    parts = open_parts(pipeline, best_device())
    first = _first_frame(parts, facts, prompt, image)
    latents = denoise(_denoiser(run_dir, backend, facts), parts, facts, prompt, seed, first, progress)
    free_gpu_memory()  # the transformer leaves before the autoencoder comes
    return write_clip(parts.decode_latents(latents)[0].cpu(), out, fps or _frame_rate(pipeline, facts))


def denoise(
    network: Network,
    parts: Parts,
    facts: FactsFile,
    prompt: str,
    seed: int,
    first_frame: Conditioning | None = None,
    progress: ProgressSink | None = None,
) -> torch.Tensor:
    """Return latents [1, channels, frames, height, width] for a prompt, on the CPU.

    Starting noise and every re-noising come from one generator in the order a stock pipeline draws them.
    """
    contract = SamplingContract.from_dict(facts.contract.dump())
    prompts = to_device(parts.encode_prompts([prompt, contract.negative_prompt], contract.max_sequence_length), "cpu")
    parts.let_go()  # the text encoders leave before a transformer comes
    conditioning = select(prompts, slice(0, 1)) | dict(first_frame or {})
    draw = torch.Generator().manual_seed(seed)
    start = parts.family.start(parts.family.noise(facts.latents, draw), conditioning)
    reporting = _reporting(network, contract.evaluations, progress) if progress else network
    latents = sample(reporting, contract, start, conditioning, select(prompts, slice(1, 2)), draw)
    return parts.family.end(parts.config, latents, conditioning)


def _frame_rate(pipeline: Path, facts: FactsFile) -> float:
    """Frames a second of the export's clips; exports of before this was noted have their family's."""
    if facts.frame_rate is not None:
        return float(facts.frame_rate)
    index = read_index(pipeline)
    return family_of(facts.pipeline_class).frame_rate(index, check_transformer_config(pipeline / "transformer"))


def _with_negative(facts: FactsFile, negative_prompt: str | None) -> FactsFile:
    """The facts with another negative prompt; RequestError where nothing is guided, so that it would do nothing."""
    if negative_prompt is None:
        return facts
    contract = SamplingContract.from_dict(facts.contract.dump())
    if not contract.guided:
        raise RequestError(
            f"--negative-prompt: {negative_prompt!r} given, but this model is sampled without text guidance, so it has "
            "no effect; leave it out"
        )
    contract = replace(contract, negative_prompt=negative_prompt)
    return facts.model_copy(update={"contract": ContractPart(**contract.to_dict())})


def _first_frame(parts: Parts, facts: FactsFile, prompt: str, image: Path | None) -> Conditioning:
    """Return the conditioning by a picture; RequestError if a model needs one and there is none, or the reverse."""
    if not parts.from_image:
        if image is not None:
            raise RequestError(f"--image: {image} given, but a {facts.pipeline_class} takes none; leave it out")
        return {}
    if image is None:
        raise RequestError(f"{facts.pipeline_class}: no --image given; this model makes a clip from its first frame")
    call = facts.call
    picture = read_picture(image, call["height"], call["width"])
    clip = picture[None, :, None].expand(1, -1, call["num_frames"], -1, -1)
    return to_device(parts.encode_images(clip, [prompt], call["max_sequence_length"]), "cpu")


def _denoiser(run_dir: Path, backend: Backend, facts: FactsFile) -> Network:
    """Return the network: the transformer, or both of two experts, of which only the one in use is in memory."""
    contract, turns = SamplingContract.from_dict(facts.contract.dump()), _InTurn()
    make = _torch_network if backend == "torch" else partial(_exported_network, backend=backend)
    if (experts := contract.experts) is None:
        return turns.network(make(run_dir, "transformer", "", facts))
    compressed = turns.network(make(run_dir, COMPONENTS[experts.compressed], "", facts))
    partner = make(run_dir, COMPONENTS[OTHER[experts.compressed]], PARTNER_FOLDER, facts)
    return experts.combine(compressed, turns.network(partner))


class _InTurn:
    """Networks of which one is in memory: it comes when it is called, and the one before leaves first.

    Two experts share the noise levels of a clip, so each comes once.
    """

    def __init__(self) -> None:
        self._loaded: tuple[Load, Network] | None = None

    def network(self, load: Load) -> Network:
        """Return the network of `load`, which is called when it is first needed."""

        def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
            if self._loaded is None or self._loaded[0] is not load:
                self._loaded = None
                free_gpu_memory()
                self._loaded = load, load()
            return self._loaded[1](x, timestep, conditioning)

        return call


def _torch_network(run_dir: Path, transformer: str, part: str, facts: FactsFile) -> Load:
    """The stock transformer of that name in the diffusers export."""
    folder = run_dir / "exports" / "diffusers" / transformer
    guidance = SamplingContract.from_dict(facts.contract.dump()).embedded_guidance
    return lambda: TorchSession(folder, best_device(), guidance)


def _exported_network(run_dir: Path, transformer: str, part: str, facts: FactsFile, *, backend: ExportBackend) -> Load:
    """The export in folder `part` of a backend's, which stands for the named transformer of the diffusers export."""
    export = Export.open(run_dir / "exports" / backend / part, backend, _make(run_dir, backend))
    if export.manifest.contract != facts.contract:
        raise RequestError(
            f"{export.folder / MANIFEST_FILE}: its sampling contract is not that of the diffusers export; make both "
            f"again with: {_make(run_dir, 'diffusers')} --format {backend}"
        )
    export.verify()
    config = check_transformer_config(run_dir / "exports" / "diffusers" / transformer)
    guidance = SamplingContract.from_dict(facts.contract.dump()).embedded_guidance
    return lambda: export.network(config, guidance)


def _reporting(network: Network, total: int, progress: ProgressSink) -> Network:
    done = 0

    def call(x: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        nonlocal done
        velocity = network(x, timestep, conditioning)
        done += 1
        progress(done, total, {})
        return velocity

    return call


def _make(run_dir: Path, export: str) -> str:
    return f"flcompress export {run_dir} --format {export}"
