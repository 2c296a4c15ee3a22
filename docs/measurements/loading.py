"""What each of two processes takes to load a model: python -m docs.measurements.loading [ENGINE ...].

A random Wan transformer of 206 M parameters (826 MB in fp32) is loaded as it is to be trained (fp32) and then, beside
it, as a frozen one (bf16), over gloo on the CPU. MB (10^6 bytes) over what the process held before, of the fuller one:
bytes of the tensors alive, counted as torch makes and frees them, and resident memory, after every weight was read once
(a file that is mapped takes memory only then). Both at their peak.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from docs.measurements.memory import ROOT
from flcompress.models.tensor_memory import Alive

MODEL = {"layers": 16, "heads": 56, "feed_forward": 3584, "vae_channels": 4}
ENGINES = ("ddp", "fsdp2", "zero3")


def child(engine: str, folder: Path) -> None:
    """In one of the processes: load, and write what it took."""
    import psutil
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from flcompress.core.steps import PassContext
    from flcompress.distributed.world import World
    from flcompress.files import peak_mb, reset_peak
    from flcompress.training.engines import engine_of

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    given: Any = {"directory": folder, "seed": 0, "data": None, "progress": None, "engine": engine}
    made = engine_of(PassContext(world=World(rank, size), precision="bf16", **given))
    # What is imported, traced and set up once is none of the model's.
    made.load_frozen(folder / "tiny/transformer")
    made._graph(folder / "model/transformer")
    before, started = psutil.Process().memory_info().rss / 1e6, time.monotonic()
    told, kept = [], []
    reset_peak()
    with Alive(count_stored=True) as alive:
        for load in (made.load_trained, made.load_frozen):
            kept.append(load(folder / "model/transformer"))
            for parameter in kept[-1].parameters():
                held = parameter._local_tensor if isinstance(parameter, DTensor) else parameter
                getattr(parameter, "ds_tensor", held).detach().view(-1).sum()
            told += [alive.most / 1e6, peak_mb() - before]
    told.append(time.monotonic() - started)
    dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    dist.destroy_process_group()


def main(engines: list[str]) -> None:
    """Print a row for each engine."""
    from flcompress.models.loading import initialise_pipeline
    from flcompress.moving_digits.blank_pipeline import write_blank

    print("| engine | trained, tensors | resident | and a frozen one, tensors | resident | seconds |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, sizes in (("model", MODEL), ("tiny", MODEL | {"layers": 1, "heads": 2, "feed_forward": 64})):
            write_blank(folder / f"{name}-blank", **sizes)
            initialise_pipeline(folder / f"{name}-blank", folder / name, 0)
        # Freed memory goes back to the system at once, so that the resident size is what is alive.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for engine in engines:
            command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            subprocess.run(
                [sys.executable, *command, "-m", "docs.measurements.loading", "--child", engine, place],
                check=True, capture_output=True, env=environment, cwd=ROOT,
            )  # fmt: skip
            told = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
            cells = [f"{max(values):,.0f}" for values in zip(*told, strict=True)]
            print(f"| {engine} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:] or list(ENGINES))
