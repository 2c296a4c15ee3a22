"""Generate a clip from a run's exports: prompt in, file out, by torch, ONNX Runtime or TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.sampling import Network, as_network, sample
from flcompress.errors import RequestError
from flcompress.exporters.clip_files import check_target, write_clip
from flcompress.exporters.diffusers_folder import FACTS_FILE
from flcompress.exporters.files import read_manifest, require_hash
from flcompress.exporters.onnx_model import MANIFEST_FILE
from flcompress.exporters.onnx_session import PROVIDERS, OnnxSession
from flcompress.exporters.parity import Denoiser
from flcompress.exporters.tensorrt_api import cuda_driver
from flcompress.exporters.tensorrt_session import TensorRTSession, require_gpu
from flcompress.models.loading import load_text, load_transformer, load_vae
from flcompress.models.quiet import no_progress_bars
from flcompress.models.text import encode_prompts
from flcompress.models.video import decode_latents
from flcompress.pipeline.passes import ProgressSink

Backend = Literal["torch", "onnx", "tensorrt"]


def generate(
    run_dir: Path, prompt: str, backend: Backend, out: Path, seed: int = 0, progress: ProgressSink | None = None
) -> Path:
    """Run the whole pipeline of `run_dir/exports` and write the clip.

    Args:
        run_dir: a run directory; every backend needs its diffusers export, for text encoder and autoencoder.
        prompt: what the clip is to show.
        backend: what runs the denoiser.
        out: .gif, .mp4 or .png (a strip of the frames).
        seed: of all noise; the same seed gives the same clip on every backend, within the export's tolerance, and the
            same as `torch.manual_seed(seed)` before a stock pipeline's call.
        progress: told of each denoising step.

    Returns:
        `out`.

    Raises:
        UnavailableError: the backend cannot run on this machine.
        RequestError: an export is missing, damaged or of another model; `out` cannot be written.
    """
    check_target(out)
    if backend == "tensorrt":
        require_gpu()
    pipeline = run_dir / "exports" / "diffusers"
    facts = read_manifest(pipeline / FACTS_FILE, _make(run_dir, "diffusers"))
    denoiser = _denoiser(run_dir, backend, facts)
    latents = denoise(denoiser, pipeline, facts, prompt, seed, progress)
    clip = decode_latents(load_vae(pipeline / "vae"), latents)[0]
    return write_clip(clip, out)


def denoise(
    network: Network,
    pipeline: Path,
    facts: dict[str, Any],
    prompt: str,
    seed: int,
    progress: ProgressSink | None = None,
) -> torch.Tensor:
    """Latents [1, channels, frames, height, width] for a prompt, on the CPU.

    Starting noise and every re-noising come from one generator in the order a stock pipeline draws them.
    """
    contract = SamplingContract.from_dict(facts["contract"])
    with no_progress_bars():
        encoder, tokenizer = load_text(pipeline / "text_encoder", pipeline / "tokenizer")
    embeds = encode_prompts(encoder, tokenizer, [prompt, ""], contract.max_sequence_length)
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *facts["latents"], generator=draw)
    told = _counted(network, contract.evaluations, progress) if progress else network
    return sample(told, contract, noise, embeds[:1], embeds[1], draw)


def _denoiser(run_dir: Path, backend: Backend, facts: dict[str, Any]) -> Network:
    if backend == "torch":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network = as_network(load_transformer(run_dir / "exports" / "diffusers" / "transformer", device))
        return lambda x, timestep, embeds: network(x.to(device), timestep.to(device), embeds.to(device)).to(x.device)
    folder = run_dir / "exports" / backend
    manifest = read_manifest(folder / MANIFEST_FILE, _make(run_dir, backend))
    if manifest["contract"] != facts["contract"]:
        raise RequestError(
            f"{folder / MANIFEST_FILE}: its sampling contract is not that of the diffusers export; make both again "
            f"with: {_make(run_dir, 'diffusers')} --format {backend}"
        )
    hashes = manifest["sha256"] if backend == "onnx" else {manifest["file"]: manifest["sha256"]}
    for name, expected in hashes.items():
        require_hash(folder / name, expected, _make(run_dir, backend))
    model = folder / str(manifest["file"])
    return _as_network(_onnx_session(model) if backend == "onnx" else TensorRTSession(model))


def _onnx_session(model: Path) -> OnnxSession:
    """On the GPU where both a driver and an ONNX Runtime built for it are here, else on the CPU."""
    import onnxruntime

    gpu = cuda_driver() and PROVIDERS["cuda"] in onnxruntime.get_available_providers()
    return OnnxSession(model, "cuda" if gpu else "cpu")


def _as_network(denoiser: Denoiser) -> Network:
    def call(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        inputs = {"hidden_states": x, "timestep": timestep, "encoder_hidden_states": embeds.expand(len(x), -1, -1)}
        return denoiser(inputs).to(x.device)

    return call


def _counted(network: Network, total: int, progress: ProgressSink) -> Network:
    done = 0

    def call(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        nonlocal done
        velocity = network(x, timestep, embeds)
        done += 1
        progress(done, total, {})
        return velocity

    return call


def _make(run_dir: Path, export: str) -> str:
    return f"flcompress export {run_dir} --format {export}"
