"""What OpenMP's waiting costs a training step, on a quiet and on a busy machine.

`python -m docs.measurements.threads` times forward and backward of the benchmark's teacher (batch 16) under several
settings of OpenMP, interleaved, each in a process of its own; `--busy N` does so beside N processes that compute
without end.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

TEACHER = Path("recipes/moving-digits/teacher/transformer")
BATCH, STEPS, ROUNDS = 16, 4, 3
SETTINGS: dict[str, dict[str, str]] = {
    "as installed": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=50000": {"GOMP_SPINCOUNT": "50000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""Name -> environment; what the caller's environment says of OpenMP is taken away first."""


def steps() -> None:
    """Print seconds, and CPU seconds, of a step; the first two steps do not count."""
    import torch

    from flcompress.models.inputs import example_inputs
    from flcompress.models.loading import load_transformer

    model = load_transformer(TEACHER).requires_grad_(True)
    inputs = example_inputs(model, batch=BATCH)
    for step in range(STEPS + 2):
        if step == 2:
            started, computed = time.monotonic(), time.process_time()
        torch.nn.functional.mse_loss(model(**inputs, return_dict=False)[0], inputs["hidden_states"]).backward()
    print((time.monotonic() - started) / STEPS, (time.process_time() - computed) / STEPS, torch.get_num_threads())


def main(busy: int) -> None:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    found: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(ROUNDS):
            for name, setting in SETTINGS.items():
                command = [sys.executable, "-m", "docs.measurements.threads", "--steps"]
                done = subprocess.run(command, env=plain | setting, capture_output=True, text=True, check=True)
                found[name].append([float(word) for word in done.stdout.split()])
    finally:
        for other in others:
            other.kill()
    print(f"{busy} busy processes beside it; batch {BATCH}, {STEPS} steps, {ROUNDS} rounds; median [lowest, highest]")
    print("| setting | threads | seconds a step | against as installed, round by round | CPU seconds a step |")
    print("|---|---|---|---|---|")
    for name, rows in found.items():
        seconds, computed = ([row[place] for row in rows] for place in (0, 1))
        ratios = [mine / installed[0] for mine, installed in zip(seconds, found["as installed"], strict=True)]
        cells = (
            f"{statistics.median(one):.3f} [{min(one):.3f}, {max(one):.3f}]" for one in (seconds, ratios, computed)
        )
        print(f"| {name} | {rows[0][2]:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if "--steps" in sys.argv:
        steps()
    else:
        main(int(sys.argv[sys.argv.index("--busy") + 1]) if "--busy" in sys.argv else 0)
