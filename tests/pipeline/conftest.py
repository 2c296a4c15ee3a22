from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pipeline import fakes
from tests.pipeline.encode_command import encode
from tests.tiny import tiny_pipeline
from tests.video_files import write_video

WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def fake_steps() -> Iterator[None]:
    fakes.CALLS.clear()
    with fakes.installed():
        yield


@pytest.fixture
def write(tmp_path: Path, model: Path) -> WriteRecipe:
    """Write a recipe file that starts from the tiny model; `steps` are its other lines."""

    def make(steps: str, name: str = "tiny") -> Path:
        path = tmp_path / f"{name}.yaml"
        head = f"version: 1\nmodel: {model}\nsampling: {{max_sequence_length: 16}}\n"
        path.write_text(head + steps, encoding="utf-8")
        return path

    return make


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes, three captions, and every way to be unusable."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write_video(folder / f"{number}.mp4", seed=number)
    write_video(folder / "deep" / "wide.mkv", frames=14, height=32, width=56)
    whole = write_video(folder / "cut.mp4", frames=20, height=48, width=64)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (folder / "text.mp4").write_text("this is no video\n")
    (folder / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (6, 40)).save(folder / "tiny.gif")
    write_video(folder / "untold.mp4")
    rows = [("0.mp4", "a one"), ("1.mp4", "a two"), ("deep/wide.mkv", "a one"), ("2.mp4", "a two"), ("cut.mp4", "cut"),
            ("text.mp4", "text"), ("empty.mp4", "empty"), ("tiny.gif", "tiny")]  # fmt: skip
    lines = [json.dumps({"file": file, "caption": caption}) for file, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def encoded(model: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("encoded") / "out"
    done = encode(model, videos, out, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return out, json.loads(done.stdout)
