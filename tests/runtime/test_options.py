"""Back ends by name, and their options as flags."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import pytest
from click.testing import CliRunner
from pydantic import Field, model_validator

from flcompress import api
from flcompress.cli import main
from flcompress.core import registry
from flcompress.errors import RequestError
from flcompress.runtime.backends.onnx_backend import OnnxBackend
from flcompress.runtime.backends.options import choose_backend, choose_backends
from flcompress.runtime.backends.torch_backend import TorchBackend


class Toy(api.Backend):
    name: ClassVar[str] = "toy"
    label: ClassVar[str] = "Toy"
    export: ClassVar[str] = "diffusers"

    replay: bool = Field(False, description="replay one graph")
    streams: int = Field(1, ge=1, description="streams that share the work")

    @model_validator(mode="after")
    def _one_stream_in_a_graph(self) -> Self:
        if self.replay and self.streams > 1:
            raise ValueError("--replay with --streams 2 given; leave one out")
        return self

    def open(self, files: api.TransformerFiles) -> api.OpenNetwork:
        raise AssertionError("never reached")


class Greedy(Toy):
    name: ClassVar[str] = "greedy"

    out: str = Field("", description="the command's own")


@pytest.fixture
def _toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "toy", f"{__name__}:Toy")


def test_options_go_to_those_that_have_them() -> None:
    assert choose_backends(["torch", "onnx"], {"provider": "cpu"}) == [TorchBackend(), OnnxBackend(provider="cpu")]
    assert choose_backend("onnx") == OnnxBackend() != choose_backend("onnx", {"provider": "cpu"})


@pytest.mark.usefixtures("_toy")
@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["onyx"], {}, "no backend 'onyx'; did you mean 'onnx'?"),
        (["torch"], {"streams": "2"}, "--streams: 2 given, but backend torch has no such option; "),
        (["toy"], {"stream": "2"}, "--stream: 2 given, but backend toy has no such option; did you mean '--streams'?"),
        (["onnx", "torch"], {"streams": "2"}, "--streams: 2 given, but none of the backends onnx, torch has "),
        (["onnx"], {"provider": "tpu"}, "--provider: tpu given, expected one of "),
        (["toy"], {"streams": "0"}, "--streams: 0 given, expected a whole number of at least 1"),
        (["toy"], {"streams": "many"}, "--streams: many given, expected a whole number of at least 1"),
        (["toy"], {"streams": 2, "replay": True}, "backend toy: --replay with --streams 2 given; leave one "),
    ],
)
def test_a_wrong_option_is_one_line(names: list[str], options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        choose_backends(names, options)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("_toy")
def test_every_field_is_a_flag_of_the_commands(tmp_path: Path) -> None:
    for command in ("generate", "bench"):
        shown = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
        assert "|toy]" in shown
        assert "--replay / --no-replay Backend toy: replay one graph." in shown
        assert "--streams VALUE Backend toy: streams that share the work (a whole number of at least 1)." in shown
    words = ["generate", str(tmp_path), "--prompt", "a", "--backend", "toy", "--replay", "--streams", "0"]
    told = CliRunner().invoke(main, words)
    assert (told.exit_code, told.stderr) == (2, "error: --streams: 0 given, expected a whole number of at least 1\n")


@pytest.mark.usefixtures("_toy")
def test_an_option_that_the_command_has_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BACKENDS, "greedy", f"{__name__}:Greedy")
    told = CliRunner().invoke(main, ["generate", "--help"])
    assert (told.exit_code, told.stderr) == (
        2,
        "error: backend greedy: option --out given, but that is one of the command's own; rename the field\n",
    )
