"""Generated clips play at the rate that their model was trained at, or that its data has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flcompress.models.configs import read_json
from flcompress.models.families import family_of
from tests.families.pipelines import EXPERTS, TINY

pytestmark = pytest.mark.e2e

RATES = {
    "wan": 16.0,
    "wan-i2v": 16.0,
    "wan-ti2v": 24.0,
    "wan-a14b": 16.0,
    "wan-a14b-i2v": 16.0,
    "hunyuan-video": 24.0,
    "hunyuan-video-i2v-concat": 24.0,
    "hunyuan-video-i2v-replace": 24.0,
    "cogvideox": 8.0,
    "cogvideox-i2v": 8.0,
    "cogvideox-1.5-i2v": 16.0,
    "ltx": 25.0,
    "mochi": 30.0,
    "flux": 1.0,
    "sd3": 1.0,
    "qwen-image": 1.0,
}


@pytest.mark.parametrize("name", [*TINY, *EXPERTS])
def test_the_frame_rate_of_a_family(pipeline_folder: Callable[[str], Path], name: str) -> None:
    folder = pipeline_folder(name)
    index = read_json(folder / "model_index.json", "")
    config = read_json(folder / "transformer" / "config.json", "")
    assert family_of(index["_class_name"]).frame_rate(index, config) == RATES[name]
