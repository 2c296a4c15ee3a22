"""Generate a clip from a run's exports: prompt in, file out, by any back end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flcompress.core.backend import Backend, OpenNetwork, TransformerFiles
from flcompress.core.program import FACTS_FILE, Program
from flcompress.core.records import ContractPart, FactsFile
from flcompress.data.captions import check_prompt
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.experts import COMPONENTS, OTHER
from flcompress.diffusion.network import CallCounter, Conditioning, Network, select, to_device
from flcompress.diffusion.sampling import sample
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.models.configs import check_transformer_config, read_index
from flcompress.models.families import family_of
from flcompress.models.folder import check_parts
from flcompress.models.parts import Parts, open_parts
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.progress import ProgressSink
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.backends.torch_backend import TorchBackend
from flcompress.runtime.clip_files import check_target, read_picture, write_clip
from flcompress.runtime.manifest import MANIFEST_FILE, PARTNER_FOLDER, read_manifest
from flcompress.runtime.torch_session import TorchSession, best_device
from flcompress.tracing.self_attention import frame_local_blocks

Load = Callable[[], Network]
"""Brings a network into memory."""


def generate(
    run_dir: Path,
    prompt: str,
    backend: str,
    out: Path,
    seed: int = 0,
    image: Path | None = None,
    progress: ProgressSink | None = None,
    fps: float | None = None,
    negative_prompt: str | None = None,
    options: Mapping[str, Any] | None = None,
    frame_local: float | None = None,
) -> Path:
    """Run the whole pipeline of `run_dir/exports` and write the clip.

    Args:
        run_dir: a run directory; every backend needs its diffusers export, for text encoder and autoencoder.
        prompt: what the clip is to show.
        backend: name of what runs the denoiser.
        out: .gif, .mp4 or .png (a strip of the frames).
        seed: seed of all noise; the same seed gives the same clip on every backend, within the export's tolerance. The
            noise is drawn as stock Wan draws it after `torch.manual_seed(seed)`; other pipelines draw other shapes.
        image: the first frame, for image-to-video models; scaled and cropped to the clip's size.
        progress: called after each denoising step.
        fps: frames a second of the file; the export's own rate by default.
        negative_prompt: what guidance leads away from; the recipe's by default.
        options: of the backend, by name.
        frame_local: share of the parameters whose blocks attend within latent frames: those that the run found to
            attend least to other frames.

    Returns:
        `out`.

    Raises:
        UnavailableError: the backend cannot run on this machine.
        RequestError: an export is missing, damaged or of another model; `out` cannot be written; a prompt that is no
            Unicode text; an unknown backend or option; `frame_local` with another backend than torch, or of a run that
            has not measured it.
    """
    runner = choose_backend(backend, options)
    check_prompt("--prompt", prompt)
    check_prompt("--negative-prompt", negative_prompt or "")
    check_target(out)
    runner.require()
    student = open_student(run_dir, runner, negative_prompt, frame_local)
    parts = student.parts
    first = _first_frame(parts, student.facts, prompt, image)
    latents = denoise(student.network, parts, student.facts, prompt, seed, first, progress)
    student.let_go()  # the transformer leaves before the autoencoder comes
    return write_clip(parts.decode_latents(latents)[0].cpu(), out, fps or student.frame_rate)


@dataclass(frozen=True, kw_only=True)
class Student:
    """An exported student; each of its parts comes into memory when it is first needed.

    Attributes:
        parts: its text encoders and autoencoder.
        network: its transformers, behind a back end.
        facts: how its clips are sampled, with the negative prompt that was asked for.
        frame_rate: frames a second of its clips.
        let_go: frees its transformers; they are loaded again when they are next called.
    """

    parts: Parts
    network: Network
    facts: FactsFile
    frame_rate: float
    let_go: Callable[[], None]


def exported_contract(facts: FactsFile) -> SamplingContract:
    """Return the sampling contract of an export."""
    return SamplingContract.from_dict(facts.contract.dump())


def open_student(
    run_dir: Path, backend: Backend, negative_prompt: str | None, frame_local: float | None = None
) -> Student:
    """Check the exports of a run and return its student; see `generate`."""
    pipeline = run_dir / "exports" / "diffusers"
    if (pipeline / FACTS_FILE).is_file():
        check_parts(pipeline, quantized=True)
    facts = read_manifest(FactsFile, pipeline / FACTS_FILE, _make(run_dir, "diffusers"))
    asked = _with_negative(facts, negative_prompt)
    blocks = () if frame_local is None else _frame_local_blocks(run_dir, backend, facts, frame_local)
    turns = _InTurn()
    return Student(
        network=_denoiser(run_dir, backend, facts, turns, blocks),
        parts=open_parts(pipeline, best_device()),
        facts=asked,
        frame_rate=_frame_rate(pipeline, facts),
        let_go=turns.let_go,
    )


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

    Starting noise and every re-noising come from one generator in the order a stock pipeline draws them, on the CPU, so
    that they are the same everywhere; between the steps everything stays on the device of the network.
    """
    contract = exported_contract(facts)
    prompts = encode_prompt(parts, contract, prompt)
    parts.let_go()  # the text encoders leave before a transformer comes
    return sample_clip(
        CallCounter(progress, contract.evaluations).around(network), parts, facts, prompts, seed, first_frame
    )


def encode_prompt(parts: Parts, contract: SamplingContract, prompt: str) -> Conditioning:
    """Return the conditioning [2, ...] of a prompt and of the negative prompt."""
    return parts.encode_prompts([prompt, contract.negative_prompt], contract.max_sequence_length)


def sample_clip(
    network: Network,
    parts: Parts,
    facts: FactsFile,
    prompts: Conditioning,
    seed: int,
    first_frame: Conditioning | None = None,
) -> torch.Tensor:
    """Return latents, as `denoise` does, for what `encode_prompt` gave."""
    contract, device = exported_contract(facts), best_device()
    prompts = to_device(prompts, device)
    conditioning = select(prompts, slice(0, 1)) | to_device(first_frame or {}, device)
    draw = torch.Generator().manual_seed(seed)
    start = parts.family.start(parts.family.noise(facts.latents, draw).to(device), conditioning)
    latents = sample(network, contract, start, conditioning, select(prompts, slice(1, 2)), draw)
    return parts.family.end(parts.config, latents, conditioning).cpu()


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
    contract = exported_contract(facts)
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


def _frame_local_blocks(run_dir: Path, backend: Backend, facts: FactsFile, share: float) -> tuple[str, ...]:
    """Return the blocks of the exported transformer that `--frame-local` means."""
    if type(backend) is not TorchBackend:
        raise RequestError(
            f"--frame-local: {share:g} given with --backend {backend.name}, expected torch, the only one that computes "
            "attention so: no export holds it"
        )
    program = Program.load(RunDirectory(run_dir).final_folder)
    if facts.kept != program.kept or exported_contract(facts) != program.contract:
        raise RequestError(
            f"{run_dir / 'exports' / 'diffusers'}: an export of an earlier student; make it again with: "
            f"{_make(run_dir, 'diffusers')}"
        )
    return frame_local_blocks(program.graph, share, run_dir)


def _denoiser(
    run_dir: Path, backend: Backend, facts: FactsFile, turns: _InTurn | None = None, local: Sequence[str] = ()
) -> Network:
    """Return the network: the transformer, or both of two experts, of which only the one in use is in memory.

    The blocks of the compressed one at the paths `local` attend within latent frames.
    """
    contract, turns = exported_contract(facts), turns or _InTurn()
    name = "transformer" if contract.experts is None else COMPONENTS[contract.experts.compressed]
    compressed = turns.network(_local(_loading(run_dir, backend, name, "", facts), local))
    if (experts := contract.experts) is None:
        return compressed
    partner = _loading(run_dir, backend, COMPONENTS[OTHER[experts.compressed]], PARTNER_FOLDER, facts)
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
                self.let_go()
                self._loaded = load, load()
            return self._loaded[1](x, timestep, conditioning)

        return call

    def let_go(self) -> None:
        """Free the one that is in memory."""
        self._loaded = None
        free_gpu_memory()


def _loading(run_dir: Path, backend: Backend, transformer: str, part: str, facts: FactsFile) -> Load:
    """Check a transformer's files, and return what loads them.

    Args:
        run_dir: the run directory.
        backend: what runs it.
        transformer: its name in the diffusers export.
        part: its folder in the backend's export.
        facts: of the diffusers export.
    """
    exports = run_dir / "exports"
    files = TransformerFiles(
        stock=exports / "diffusers" / transformer,
        export=exports / backend.export / part,
        guidance=exported_contract(facts).embedded_guidance,
        make_it=_make(run_dir, backend.export),
    )
    manifest = backend.manifest(files)
    if manifest is not None and manifest.contract != facts.contract:
        raise RequestError(
            f"{files.export / MANIFEST_FILE}: its sampling contract is not that of the diffusers export; make both "
            f"again with: {_make(run_dir, 'diffusers')} --format {backend.export}"
        )
    backend.verify(files)
    return lambda: backend.open(files)


def _local(load: Load, paths: Sequence[str]) -> Load:
    """Return what loads torch's network with attention within latent frames in the blocks at the paths."""
    if not paths:
        return load

    def load_local() -> Network:
        opened = load()
        assert isinstance(opened, OpenNetwork)
        assert isinstance(opened.network, TorchSession)
        return opened.network.frame_local(paths)

    return load_local


def _make(run_dir: Path, export: str) -> str:
    return f"flcompress export {run_dir} --format {export}"
