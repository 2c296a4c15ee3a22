"""The inputs of updates, prepared in a thread or made when taken: the same numbers, errors where they belong."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from flcompress.core.steps import PassContext
from flcompress.data.dataset import LatentDataset
from flcompress.draws import Draws
from flcompress.driver.manager import apply
from flcompress.errors import DataError
from flcompress.progress import QuietDisplay
from flcompress.training import feed as feeding
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.feed import Feed
from flcompress.training.loop import train
from flcompress.training.role import TrainedRole
from tests.data.datasets import write_dataset
from tests.training.home import Home

EVERY_TRAINING = [
    "pretrain: {steps: 2, batch: 2}",
    "stochastic-depth: {remove: 0.3, by: middle, steps: 2, batch: 2}",
    "prune: {remove: 0.3, by: middle}",
    "feature-distill: {steps: 2, batch: 2}",
    "dmd: {steps: 2, critic_updates: 2, batch: 2, student_steps: 3, inter_cfg: [2, 3], gan_weight: 0.01}",
    "consistency: {levels: 4, guidance: 2, student_steps: 2, steps: 2, batch: 2}",
]
SETTINGS = ["sampling.num_inference_steps=5", "training.micro_batch=1"]

Clips = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """A thread prepares on the CPU too; yields the names of the threads that read, none of which outlives the test."""
    monkeypatch.setattr(feeding, "THREADED", ("cpu",))
    names: set[str] = set()
    read = LatentDataset._read

    def noted(self: LatentDataset, entries: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        names.add(threading.current_thread().name)
        return read(self, entries)

    monkeypatch.setattr(LatentDataset, "_read", noted)
    yield names
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")] == []


def trained(data: Path, folder: Path, *, steps: int = 6, end_at: int = 0) -> torch.Tensor:
    """Train with two updates a step, of micro batches of two samples and one; return all figures, and the weights."""
    clips = LatentDataset.load(data)
    context = PassContext(
        directory=folder,
        seed=0,
        data=lambda program: clips,
        progress=lambda *_: None,
        checkpoint_seconds=0.0,
        micro_batch=2,
    )
    torch.manual_seed(0)
    engine, model = engine_of(context), nn.Linear(1, 1)
    role = TrainedRole(engine, "model", model, batch=3, hyper=Hyper(learning_rate=0.1))

    def read_clips(draws: Draws) -> Clips:
        x0, _ = clips.batch(draws.batch, draws.shared, draws.mine)
        return x0.flatten(1)[:, :1], draws.normal(1)

    def read_noise(draws: Draws) -> Clips:
        return draws.uniform()[:, None], draws.normal(1)

    feed = Feed(context, read_clips, read_noise)

    def step(number: int, draws: Draws) -> Mapping[str, float]:
        if number == end_at:
            raise KeyboardInterrupt

        def loss(inputs: Clips) -> torch.Tensor:
            error: torch.Tensor = (role.module(inputs[0]) - inputs[1]).square().mean()
            return error

        return {
            **role.update(draws, lambda draws: loss(feed.take(read_clips, draws))),
            **{f"{key}_of_noise": value for key, value in role.update(
                draws, lambda draws: loss(feed.take(read_noise, draws))).items()},
        }  # fmt: skip

    train(step, [role], engine=engine, name="test", steps=steps, batch=3, feed=feed)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_thread_prepares_what_would_be_made_when_taken(tmp_path: Path, threads: set[str]) -> None:
    """Bit for bit, also of a training that is interrupted: what was prepared for a step that never came is dropped."""
    data = write_dataset(tmp_path / "data", {(5, 16, 16): 5})
    ahead = trained(data, tmp_path / "ahead")
    assert {name.split("_")[0] for name in threads} == {"ahead"}
    with pytest.raises(KeyboardInterrupt):
        trained(data, tmp_path / "resumed", end_at=4)
    assert torch.equal(trained(data, tmp_path / "resumed"), ahead)
    with pytest.MonkeyPatch.context() as unthreaded:
        unthreaded.setattr(feeding, "THREADED", ())
        threads.clear()
        assert torch.equal(trained(data, tmp_path / "taken"), ahead)
    assert threads == {"MainThread"}
    logs = {folder: (tmp_path / folder / "metrics.jsonl").read_text() for folder in ("ahead", "resumed", "taken")}
    assert len(set(logs.values())) == 1


def test_a_shard_that_is_gone_ends_the_step_that_needs_it(tmp_path: Path, threads: set[str]) -> None:
    data = write_dataset(tmp_path / "data", {(5, 16, 16): 40}, a_shard=1)
    with pytest.MonkeyPatch.context() as unthreaded:
        unthreaded.setattr(feeding, "THREADED", ())
        trained(data, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    drawn = [entries(data, step) for step in range(1, 7)]
    gone = next(file for file in drawn[3] if all(file not in files for files in drawn[:3]))
    size = (data / gone).stat().st_size
    (data / gone).write_bytes(bytes(size))  # `load` looks at sizes alone
    with pytest.raises(DataError, match=f"^{data / gone}: not a whole shard"):
        trained(data, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() == lines[:3]


def entries(data: Path, step: int) -> list[str]:
    """The files of the clips that a step draws."""
    clips = LatentDataset.load(data)
    draws = Draws(0, "test", step, batch=3)
    return [f"clips-{shard:05d}.safetensors" for shard in clips._draw(3, draws.shared, draws.mine)[:, 0].tolist()]


@pytest.mark.e2e
def test_every_training_draws_in_a_thread_what_it_would_draw_itself(
    home: Home, tmp_path: Path, threads: set[str]
) -> None:
    """Figures and weights of each pass, to the bit, with micro batches and the updates of three roles."""
    recipe = home.recipe("ahead", EVERY_TRAINING)
    results = []
    for name, kinds in (("ahead", ("cpu",)), ("taken", ())):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feeding, "THREADED", kinds)
            run = apply(recipe, home.begun(tmp_path / name), overrides=SETTINGS, display=QuietDisplay(), device="cpu")
        files = [*run.path.glob("passes/*/metrics.jsonl"), *run.path.glob("passes/*/*/*.safetensors")]
        results.append({file.relative_to(run.path): file.read_bytes() for file in files})
    assert len([path for path in results[0] if path.name == "metrics.jsonl"]) == 5
    assert results[0] == results[1]
    assert len(threads) > 1
