"""Every back end on one transformer: difference from torch, seconds of a network call, memory.

`python -m docs.measurements.gpu_backends OUT` makes Wan 2.1 1.3B with 21 of its 30 blocks and random weights from the
shipped configuration, exports it for each back end that is installed, and calls each at a small size and at 480p, 81
frames. It is meant to end within 15 minutes on one data-centre GPU; on a machine without one it runs what runs there
(give a small `--config` and `--size`). Results go to OUT/results.json, one object for each back end and size, as soon
as they are there, so that a run that is cut off has those before.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from flcompress.core.backend import Backend, OpenNetwork, TransformerFiles
from flcompress.core.program import Fact, Program
from flcompress.core.registry import find_exporter
from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.network import Conditioning, to_device
from flcompress.diffusion.student import student_contract
from flcompress.errors import FlcompressError
from flcompress.evaluation.bench import read_size
from flcompress.evaluation.machine import MemoryMeter, machine, memory_in_use
from flcompress.models.configs import read_json
from flcompress.models.loading import meta_transformer, transformer_class
from flcompress.models.tensor_memory import free_gpu_memory
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.sizes import sizes_of
from flcompress.runtime.torch_session import best_device
from flcompress.tracing.counting import listed_blocks

CONFIG = Path(__file__).resolve().parents[2] / "recipes" / "configs" / "wan2.1-t2v-1.3b"
TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """A back end, what it needs exported, and its options."""

    name: str
    backend: str
    options: dict[str, Any]
    exports: tuple[str, ...] = ()


def cases(device: str) -> list[Case]:
    """Return what is tried on a device: on a GPU in bf16."""
    provider = "cuda" if device == "cuda" else "cpu"
    found = [
        Case(name="torch eager", backend="torch", options={}),
        Case(name="torch.compile", backend="compile", options={}),
        Case(name="ONNX Runtime", backend="onnx", options={"provider": provider}, exports=("onnx",)),
    ]
    if device == "cuda":
        found += [
            Case(name="TensorRT", backend="tensorrt", options={}, exports=("onnx", "tensorrt")),
            Case(name="Torch-TensorRT", backend="torch-tensorrt", options={}, exports=("torch-tensorrt",)),
        ]
    return found


def make_program(config: Path, layers: int, folder: Path, size: tuple[int, int, int]) -> Program:
    """Write a transformer with random weights, and return it as a four-step student; its size is one clip's."""
    source = config / "transformer"
    arguments = {key: value for key, value in read_json(source / "config.json", "").items() if key[0] != "_"}
    torch.manual_seed(0)
    model = transformer_class(source)(**{**arguments, "num_layers": layers})
    model.save_pretrained(folder / "transformer")
    shutil.copytree(config / "vae", folder / "vae")
    teacher = contract_of(
        read_json(config / "scheduler" / "scheduler_config.json", ""),
        num_inference_steps=50,
        guidance_scale=5.0,
        max_sequence_length=TOKENS,
    )
    graph = listed_blocks(meta_transformer(folder / "transformer"))
    program = Program(
        graph=graph,
        index=read_json(config / "model_index.json", ""),
        latents=(arguments["in_channels"], 1, 2, 2),
        components={name: folder / name for name in ("transformer", "vae")} | {"original": folder / "transformer"},
        contract=student_contract(teacher, 4),
        teacher_contract=teacher,
        facts=frozenset({Fact.TRAINED, Fact.FEW_STEP}),
        kept={block.path: block.path for block in graph.blocks},
    )
    names = ("--size, frames", "--size, height", "--size, width")
    latents = (program.latents[0], *sizes_of(program).latents(*size, names))
    return Program(**{**vars(program), "latents": latents})


def export(program: Program, name: str, out: Path, precision: str) -> float:
    """Write an export for the GPU of this machine; return the seconds that it took."""
    arguments: dict[str, Any] = {"precision": precision}
    if name != "onnx" and best_device() == "cuda":
        arguments["targets"] = ["current"]
    exporter, target = find_exporter(name).model_validate(arguments), out / "exports" / name
    exporter.check()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    started = time.monotonic()
    exporter.export(program, target, out / "exports", lambda done, total, values: None)
    return time.monotonic() - started


@torch.no_grad()
def measure(
    network: OpenNetwork, inputs: tuple[torch.Tensor, torch.Tensor, Conditioning], device: str, rounds: int
) -> tuple[torch.Tensor, list[float], int | None]:
    """Return the output in fp32 on the CPU, the seconds of each call after two that warm up, and the peak's growth."""
    for _ in range(2):
        output = network(*inputs)
    meter, seconds = MemoryMeter(device), []
    meter.begin()
    for _ in range(rounds):
        _wait(device)
        started = time.perf_counter()
        output = network(*inputs)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return output.float().cpu(), seconds, meter.growth()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def inputs_of(program: Program, device: str) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Return (latents, timestep, conditioning) of one clip at the program's size."""
    draw = torch.Generator().manual_seed(0)
    config = read_json(program.components["transformer"] / "config.json", "")
    x = torch.randn(1, *program.latents, generator=draw)
    conditioning = program.family.call_conditioning(program.index, config, 1, program.latents[1:], TOKENS, draw)
    return x.to(device), torch.tensor([700.0], device=device), to_device(conditioning, device)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), default=CONFIG, help="Pipeline folder of configurations.")
@click.option("--layers", type=int, default=21, show_default=True)
@click.option("--size", "sizes", multiple=True, default=("17x256x256", "81x480x832"), show_default=True)
@click.option("--rounds", type=int, default=10, show_default=True)
@click.option("--only", multiple=True, help="Back ends, by their registered names.")
def main(out: Path, config: Path, layers: int, sizes: tuple[str, ...], rounds: int, only: tuple[str, ...]) -> None:
    """Measure, and print a line for each back end and size."""
    device = best_device()
    precision = "bf16" if device == "cuda" else "fp32"
    results: dict[str, Any] = {"machine": machine(device), "layers": layers, "precision": precision, "rows": []}
    for text in sizes:
        folder = out / text
        shutil.rmtree(folder, ignore_errors=True)
        program = make_program(config, layers, folder, read_size(text))
        inputs, reference, made = inputs_of(program, device), None, set[str]()
        for case in cases(device):
            if only and case.backend not in only and case.backend != "torch":
                continue
            row: dict[str, Any] = {"backend": case.name, "size": text}
            try:
                backend: Backend = choose_backend(case.backend, case.options)
                backend.require()
                for name in case.exports:
                    if name not in made:
                        row[f"{name} seconds"] = export(program, name, folder, precision)
                        made.add(name)
                before = memory_in_use(device)
                network = backend.open(
                    TransformerFiles(
                        stock=program.components["transformer"],
                        export=folder / "exports" / backend.export,
                        guidance=None,
                        make_it="this script",
                    )
                )
                output, seconds, growth = measure(network, inputs, device, rounds)
                reference = output if reference is None else reference
                row |= {
                    "device": network.device,
                    "precision": network.precision,
                    "median seconds": statistics.median(seconds),
                    "spread": [min(seconds), max(seconds)],
                    "peak growth": growth,
                    "in use": memory_in_use(device) - before,
                    "difference": float((output - reference).abs().max()),
                    "magnitude": float(reference.abs().max()),
                }
                del network
            except (FlcompressError, RuntimeError, ImportError) as error:
                row["failed"] = " ".join(str(error).split())[:300]
            free_gpu_memory()
            results["rows"].append(row)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
