"""Measure the exports of a Wan of 480p x 81 frames: `python docs/measurements/export.py fp16 [1.0B]`.

Time and peak memory of each exporter, every one in a process of its own, with random weights stored in fp32, beside
what the pre-flight asks for. Needs 10 GB of disk in the temporary folder (TMPDIR) for the largest.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SIZES = {
    "50M": {"num_layers": 8, "num_attention_heads": 4, "ffn_dim": 3072},
    "300M": {"num_layers": 13, "num_attention_heads": 8, "ffn_dim": 6144},
    "1.0B": {"num_layers": 21, "num_attention_heads": 12, "ffn_dim": 8960},
}
"""The last one is Wan 2.1 1.3B, 30 blocks cut to 21; the others have fewer blocks and narrower ones."""

LATENTS = (16, 21, 60, 104)
PER_FILE = 100_000_000
"""Numbers in a file of weights."""

VAE = {"_class_name": "AutoencoderKLWan", "scale_factor_temporal": 4, "scale_factor_spatial": 8}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "stochastic_sampling": True,
}


def write_model(folder: Path, size: str) -> None:
    """A transformer folder in safetensors shards, random weights, written tensor by tensor."""
    from accelerate import init_empty_weights
    from diffusers import WanTransformer3DModel
    from safetensors.torch import save_file

    with init_empty_weights():
        model = WanTransformer3DModel(**SIZES[size])
    model.save_config(str(folder))
    draw = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    written = 0
    names = list(model.state_dict().items())
    for place, (name, tensor) in enumerate(names):
        norm = name.endswith("weight") and "norm" in name
        shard[name] = torch.ones(tensor.shape) if norm else torch.randn(tensor.shape, generator=draw) * 0.02
        if sum(one.numel() for one in shard.values()) > PER_FILE or place == len(names) - 1:
            save_file(shard, str(folder / f"diffusion_pytorch_model-{written:05}.safetensors"))
            shard, written = {}, written + 1


def program_of(folder: Path) -> Any:
    """The program that a recipe would hand to the exporters."""
    from flcompress.core.program import Program
    from flcompress.diffusion.contract import contract_of
    from flcompress.diffusion.student import student_contract
    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import meta_transformer
    from flcompress.tracing.tracer import trace

    model = meta_transformer(folder / "transformer")
    teacher = contract_of(SCHEDULER, num_inference_steps=50, guidance_scale=5.0, max_sequence_length=512)
    return Program(
        graph=trace(model, example_inputs(model)),
        index={"_class_name": "WanPipeline"},
        latents=LATENTS,
        components={"transformer": folder / "transformer", "vae": folder / "vae"},
        contract=student_contract(teacher, 4),
        teacher_contract=teacher,
    )


def step(name: str, precision: Any, folder: Path) -> None:
    """One exporter, in this process."""
    from flcompress.exporters.onnx_model import OnnxExporter
    from flcompress.exporters.shared import preflight
    from flcompress.exporters.tensorrt_engine import TensorRTExporter

    exporter = OnnxExporter(precision=precision) if name == "onnx" else TensorRTExporter()
    model = preflight.ONNX_MEMORY if name == "onnx" else preflight.TENSORRT_MEMORY
    target = folder / "exports" / name
    target.mkdir(parents=True)
    program = program_of(folder)
    weights = preflight.weight_bytes(program.components["transformer"], precision)
    load, started, busy = os.getloadavg()[0], time.monotonic(), time.process_time()
    reached: list[int] = []
    summary = exporter.export(
        program, target, folder / "exports", lambda *_: reached.append(round(time.monotonic() - started))
    )
    figures = {
        "export": name,
        "seconds": round(time.monotonic() - started),
        "seconds_by_step": reached,
        "processor_seconds": round(time.process_time() - busy),
        "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
        "weights_gb": round(weights / 1e9, 3),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "asked_memory_gb": round(preflight.peak_memory(weights, model) / 1e9, 2),
    }
    print(json.dumps(figures | {key: one for key, one in summary.items() if key != "sha256"}), flush=True)


def main(precision: str, size: str = "1.0B") -> None:
    """Both exporters, one after the other."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "transformer").mkdir()
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(VAE))
        write_model(folder / "transformer", size)
        for name in ("onnx", "tensorrt"):
            subprocess.run([sys.executable, __file__, precision, size, name, made], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        main(*sys.argv[1:])
    else:
        step(sys.argv[3], sys.argv[1], Path(sys.argv[4]))
