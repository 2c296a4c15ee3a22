"""Trainings killed at random moments and resumed, against unbroken ones: the table of docs/benchmarks/training.md.

`python -m docs.measurements.resume --kills 100 [--seed 1]` spreads the kills over four engines. It ends with exit
status 1 at the first result that differs in one bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from pathlib import Path

from tests.training.home import Home
from tests.training.killing import killed

ENGINES = ("local", "ddp", "zero2", "fsdp2")
PLACES = ("start", "step", "checkpoint", "end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    print("| engine | processes | kills | in start-up | between checkpoints | within one | at the end | differ |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        home = Home.make(Path(folder))
        for place, engine in enumerate(ENGINES):
            share = given.kills // len(ENGINES) + (place < given.kills % len(ENGINES))
            found = Counter(kill.found.split()[0] for kill in killed(home, engine, share, given.seed))
            cells = [engine, 1 if engine == "local" else 2, share, *(found[name] for name in PLACES), 0]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
