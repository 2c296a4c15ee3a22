"""Weights & Biases: figures and strips of one training in one run, however often it is ended; nothing sent offline."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from torch import nn

from flcompress.draws import Draws
from flcompress.driver.manager import apply
from flcompress.errors import TrainingError, UnavailableError
from flcompress.training import loop
from flcompress.training.engines import Hyper, engine_of
from flcompress.training.role import TrainedRole
from flcompress.training.watching.monitor import Watch
from flcompress.training.watching.strips import strip_of
from flcompress.training.watching.trackers import trackers
from tests.fixtures.tiny import tiny_pipeline
from tests.training.watching.test_monitor import work
from tests.training.watching.wandb_files import exit_status, history, offline_runs, run_id

wandb = pytest.importorskip("wandb")
NOWHERE = "set WANDB_MODE=offline, or leave it out"


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The only way out, a proxy that only listens; and nobody's settings or keys."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.2)
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        yield proxy
        wandb.teardown()  # its settings are of the process, and so is the service that it starts


def train(folder: Path, *, ends_at: int = 0) -> None:
    given = replace(work(folder), log_to=("wandb",))
    role = TrainedRole(engine_of(given), "model", nn.Linear(3, 1), batch=4, hyper=Hyper(learning_rate=0.1))

    def train_step(step: int, draws: Draws) -> Mapping[str, float]:
        if step == ends_at:
            raise TrainingError("ended")
        return role.update(draws, lambda draws: role.module(draws.normal(3)).square().mean())

    def look(step: int) -> Mapping[str, float]:
        strip_of(folder, step).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 4), (step, 0, 0)).save(strip_of(folder, step))
        return {"held": 1.0 / (1.0 + step)}

    seen = Watch(given, name="test", evaluate=look, held_out="held")
    loop.train(train_step, [role], engine=engine_of(given), name="test", steps=4, batch=4, watch=seen)


def test_a_training_that_was_ended_goes_on_in_its_run(
    tmp_path: Path, network: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, other = tmp_path / "one", tmp_path / "other"
    with pytest.raises(TrainingError, match="ended"):
        train(folder, ends_at=4)
    train(folder)
    train(other)
    wandb.teardown()  # its service, a process of its own, may not have written all of the last run before it ends
    first, second = offline_runs(folder)
    assert run_id(first) == run_id(second) != run_id(offline_runs(other)[0])
    assert [exit_status(file) for file in (first, second)] == [1, 0]
    rows = history(second)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert history(first)[3]["model_loss"] == rows[3]["model_loss"]
    for line in (folder / loop.METRICS_FILE).read_text().splitlines():
        record = json.loads(line)
        step = record.pop("step")
        assert record.items() <= rows[step].items()
    for row in rows[::2]:
        with Image.open(second.parent / "files" / row["samples.path"]) as shown:
            assert shown.getpixel((0, 0)) == (row["_step"], 0, 0)
    with pytest.raises(TimeoutError):
        network.accept()


def test_what_the_server_has_is_not_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        """As a run that is resumed: it knows the number of its next step."""

        step = 2
        seen: Sequence[tuple[int, Any]] = ()

        def log(self, values: Any, step: int) -> None:
            self.step = step
            self.seen = [*self.seen, (step, values)]

        def finish(self, exit_code: int) -> None:
            self.seen = [*self.seen, (exit_code, "end")]

    server = Server()
    monkeypatch.setattr(wandb, "init", lambda **given: server)
    before = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    with trackers(replace(work(tmp_path), log_to=("wandb",)), "test", 3, before) as (run,):
        run.log(4, {"loss": 4.0})
    assert server.seen == [(2, {"loss": 2.0}), (3, {"loss": 3.0}), (4, {"loss": 4.0}), (0, "end")]


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (None, f"training.log_to: wandb given, but no one is logged in; log in with `wandb login`, {NOWHERE}"),
        (
            "short",
            "training.log_to: wandb given, but it cannot be used: WANDB_API_KEY invalid: API key must have 40+ "
            f"characters, has 5; log in with `wandb login`, {NOWHERE}",
        ),
    ],
)
def test_a_failing_login_is_said_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, message: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    tiny_pipeline(tmp_path / "model", layers=1)
    content = {"version": 1, "model": {"path": "model"}, "training": {"log_to": ["wandb"]}}
    (tmp_path / "logged.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UnavailableError) as error:
        apply(tmp_path / "logged.yaml", tmp_path / "run")
    assert str(error.value) == message
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**given: Any) -> None:
        raise wandb.errors.CommError("Timed out while retrying.\nConsider increasing the init_timeout setting")

    monkeypatch.setattr(wandb, "init", fails)
    with pytest.raises(UnavailableError) as error, trackers(replace(work(tmp_path), log_to=("wandb",)), "test"):
        pass
    assert str(error.value) == (
        "training.log_to: wandb given, but it cannot be used: Timed out while retrying; log in with `wandb login`, "
        + NOWHERE
    )
