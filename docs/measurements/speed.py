"""What the training loop costs and saves: python -m docs.measurements.speed RUN [--processes].

RUN is a finished run of recipes/moving-digits.yaml: its prune set and its batch are used, on the embedded teacher.
Every ratio is of times measured in turn in one process; the median over rounds is printed with its quartiles.
`--processes` measures one process against two with one thread each instead, which needs two free cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flcompress.core.steps import PassContext
from flcompress.diffusion.process import FLOW
from flcompress.draws import Draws
from flcompress.driver.rundir import RunDirectory
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, compile_blocks
from flcompress.tracing.prefix import remember
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.loop import train
from flcompress.training.role import TrainedRole

TEACHER = Path("recipes/moving-digits/teacher/transformer")
BATCH, ROUNDS, TOKENS = 16, 24, 16
LATENTS = (16, 3, 8, 8)


def main(run: RunDirectory, processes: bool) -> None:
    """Measure and print."""
    if processes:
        _processes()
        return
    prune_set = run.final().prune_set
    print(f"prune set: {', '.join(prune_set)}; batch {BATCH}; {torch.get_num_threads()} threads")
    _prefix(prune_set)
    _loop()
    _guidance()
    _compile()


class _Setting:
    """The teacher in training, and one batch."""

    def __init__(self) -> None:
        self.model = load_transformer(TEACHER).requires_grad_(True)
        self.graph = trace(self.model, example_inputs(self.model))
        self.network = as_network(self.model)
        draws = Draws("speed", batch=BATCH)
        self.x, self.level = draws.normal(*LATENTS), draws.uniform()
        self.given = {"encoder_hidden_states": draws.normal(TOKENS, self.model.config.text_dim)}
        self.timestep = FLOW.timestep(self.level)

    def forward(self) -> torch.Tensor:
        return self.network(self.x, self.timestep, self.given)

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: one.grad for name, one in self.model.named_parameters() if one.grad is not None}
        self.model.zero_grad()
        return found


def _prefix(prune_set: tuple[str, ...]) -> None:
    """One step of Stage II with the full path of the same weights as target, with and without the shared prefix."""
    here = _Setting()
    draw = torch.Generator().manual_seed(0)

    def naive(skipped: list[str]) -> None:
        with torch.no_grad():
            full = here.forward()
        with skip(here.model, skipped, graph=here.graph):
            (here.forward() - full).square().mean().backward()

    def shared(skipped: list[str]) -> None:
        with remember(here.model, here.graph, until=skipped[0]) as memory:
            with skip(here.model, skipped, graph=here.graph):
                pruned = here.forward()
            with torch.no_grad(), memory.recalling():
                full = here.forward()
        (pruned - full).square().mean().backward()

    ratios, difference = [], 0.0
    masks = [
        [path for path in prune_set if torch.rand((), generator=draw) < 0.5] or [prune_set[-1]] for _ in range(ROUNDS)
    ]
    for turn, skipped in enumerate(masks):
        times = {}
        for work in (naive, shared) if turn % 2 else (shared, naive):
            times[work] = _seconds(partial(work, skipped))
            times[work, "gradients"] = here.gradients()
        ratios.append(times[shared] / times[naive])
        pairs = zip(times[naive, "gradients"].values(), times[shared, "gradients"].values(), strict=True)
        difference = max(difference, *(float((one - other).abs().max()) for one, other in pairs))
    print(f"Stage II step, shared prefix over naive: {_spread(ratios)}; largest gradient difference {difference:g}")


def _loop() -> None:
    """`train` against the same step in a bare loop."""
    here = _Setting()
    steps = 30

    def bare() -> None:
        optimizer = torch.optim.AdamW(here.model.parameters(), lr=1e-6, foreach=True)
        for step in range(steps):
            draws = Draws("speed", step, batch=BATCH)
            noise = draws.normal(*LATENTS)
            loss = (here.network(noise, here.timestep, here.given) - noise).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(here.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            work = PassContext(directory=Path(folder), seed=0, data=_no_data, progress=lambda done, total, values: None)
            engine = engine_of(work)
            role = TrainedRole(engine, "model", here.model, batch=BATCH, hyper=Hyper(learning_rate=1e-6))

            def loss(draws: Draws) -> torch.Tensor:
                noise = draws.normal(*LATENTS)
                return (here.network(noise, here.timestep, here.given) - noise).square().mean()

            def train_step(step: int, draws: Draws) -> dict[str, float]:
                return role.update(draws, loss)

            train(train_step, [role], engine=engine, name="speed", steps=steps, batch=BATCH)

    print(f"training loop over a bare one ({steps} steps, one checkpoint): {_ratio(ours, bare, rounds=5)}")


def _guidance() -> None:
    """Both branches of guidance in one forward, against two."""
    here = _Setting()
    twice = [torch.cat([one, one]) for one in (here.x, here.timestep)]
    given = {name: torch.cat([one, torch.zeros_like(one)]) for name, one in here.given.items()}
    empty = {name: torch.zeros_like(one) for name, one in here.given.items()}

    def together() -> None:
        with torch.no_grad():
            here.network(twice[0], twice[1], given)

    def apart() -> None:
        with torch.no_grad():
            here.forward()
            here.network(here.x, here.timestep, empty)

    print(f"guidance branches in one forward over two: {_ratio(together, apart, rounds=ROUNDS)}")


def _compile() -> None:
    """A step of compiled blocks against eager ones."""
    eager, compiled = _Setting(), _Setting()
    compile_blocks(compiled.model, compiled.graph)

    def step(here: _Setting) -> Callable[[], None]:
        def run() -> None:
            here.forward().square().mean().backward()
            here.model.zero_grad()

        return run

    step(compiled)()
    print(f"forward and backward, torch.compile over eager: {_ratio(step(compiled), step(eager), rounds=12)}")


def _processes() -> None:
    """The same global batch on one process and on two, one thread each; the start-up is subtracted."""
    for batch, few, many in ((BATCH, 8, 40), (4 * BATCH, 4, 16)):
        ratios = []
        with tempfile.TemporaryDirectory() as home:
            for turn in range(3):
                rates = {}
                for size in (1, 2) if turn % 2 else (2, 1):
                    run = Path(home) / f"{turn}-{size}"
                    long, short = (_timed(run.with_suffix(f".{steps}"), size, batch, steps) for steps in (many, few))
                    rates[size] = (many - few) / (long - short)
                ratios.append(rates[2] / rates[1])
        print(f"two processes (ddp) over one, steps a second at batch {batch}: {_spread(ratios)}", flush=True)


def _timed(run: Path, size: int, batch: int, steps: int) -> float:
    """Seconds of the training pass alone, as its record says."""
    recipe = run.with_name(f"{run.name}.yaml")
    recipe.write_text(
        f"version: 1\nname: speed\nmodel: {TEACHER.parent.resolve()}\nsampling: {{max_sequence_length: {TOKENS}}}\n"
        "data: {moving-digits: {clips: 64}}\n"
        f"training: {{engine: {'ddp' if size == 2 else 'local'}}}\n"
        f"passes:\n  - pretrain: {{steps: {steps}, batch: {batch}, learning_rate: 1e-6}}\n"
    )
    start = [sys.executable, "-m"]
    if size == 2:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*start, "flcompress", "apply", str(recipe), "--run-dir", str(run), "--quiet"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(RunDirectory(run).entries()[0].record.seconds)


def _no_data(program: Any) -> Any:
    raise AssertionError("nothing here reads data")


def _ratio(one: Callable[[], None], other: Callable[[], None], rounds: int) -> str:
    ratios = []
    one(), other()
    for turn in range(rounds):
        times = {work: _seconds(work) for work in ((one, other) if turn % 2 else (other, one))}
        ratios.append(times[one] / times[other])
    return _spread(ratios)


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}], {len(ratios)} rounds"


if __name__ == "__main__":
    main(RunDirectory(sys.argv[1]), "--processes" in sys.argv)
