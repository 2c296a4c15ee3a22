"""Every transformer class of diffusers: traced, a block skipped, a block removed, as the support matrix says."""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers.models.transformers
import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin

import flcompress
from flcompress.errors import NotRemovable
from flcompress.tracing.removal.cuts import Cut
from flcompress.tracing.removal.remove import certify
from tests.zoo import ZOO
from tests.zoo.check import answer, largest_difference, named_set, randomised

CENSUS = Path(__file__).parents[2] / "docs/measurements/census.json"
MATRIX: dict[str, dict[str, Any]] = {row["model"]: row for row in json.loads(CENSUS.read_text())["rows"]}

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]  # stock models warn of much that is not ours]


def sampled(name: str) -> str:
    """One block of the entry, spread over the zoo."""
    entry = ZOO[name]
    paths = [f"{stack}.{index}" for stack, depth in entry.blocks.items() for index in range(depth)]
    return paths[zlib.crc32(name.encode()) % len(paths)]


def test_every_class_is_in_the_zoo() -> None:
    classes = set()
    for info in pkgutil.iter_modules(diffusers.models.transformers.__path__):
        module = import_module(f"diffusers.models.transformers.{info.name}")
        for name, member in vars(module).items():
            if inspect.isclass(member) and issubclass(member, ModelMixin) and member.__module__ == module.__name__:
                classes.add(name)
    assert {entry.model_class for entry in ZOO.values()} == classes
    assert set(MATRIX) == set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_trace_skip_and_remove(name: str) -> None:
    entry, path = ZOO[name], sampled(name)
    model, inputs = randomised(entry), entry.draw(0)
    graph = flcompress.trace(model, inputs)
    assert {stack: len(blocks) for stack, blocks in graph.stacks.items()} == dict(entry.blocks)
    for block in graph.blocks:
        module = model.get_submodule(block.path)
        assert block.parameters == sum(parameter.numel() for parameter in module.parameters()) > 0
        assert block.flops > 0
    full = answer(model, entry.draw(1))
    with flcompress.skip(model, [path]):
        assert not all(map(torch.equal, answer(model, entry.draw(1)), full))
    assert all(map(torch.equal, answer(model, entry.draw(1)), full))
    if path in MATRIX[name]["removed"]:
        smaller = flcompress.remove(model, [path], inputs)
        assert largest_difference(entry, model, smaller, [path]) == 0
    else:
        with pytest.raises(NotRemovable, match=f"^{re.escape(MATRIX[name]['refused'][path])}$"):
            flcompress.remove(model, [path], inputs)


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("latte", ("transformer_blocks.1", "temporal_transformer_blocks.1")),  # zipped
        ("flux3", ("txt_mode_blocks.1", "mode_blocks.image.1", "mode_blocks.image_cond.1")),  # one key, three lists
        ("hunyuan-dit", ("blocks.1", "blocks.4")),  # the two ends of a long skip
        ("wan-animate", ("blocks.1", "blocks.3")),  # one of every two, so that the adapters come after every block
        ("sana-wm", ("blocks.0", "blocks.1")),  # a whole period
    ],
)
def test_sets_that_go_only_together(name: str, paths: tuple[str, ...]) -> None:
    entry = ZOO[name]
    model, inputs = randomised(entry), entry.draw(0)
    with pytest.raises(NotRemovable) as refusal:
        flcompress.remove(model, paths[:1], inputs)
    assert named_set(paths[0], str(refusal.value)) == paths
    smaller = flcompress.remove(model, paths, inputs)
    assert largest_difference(entry, model, smaller, paths) == 0


@pytest.mark.parametrize(
    ("name", "path", "changes"),
    [
        ("easyanimate", "transformer_blocks.0", {"num_layers": (4, 3), "mmdit_layers": (2, 1)}),
        ("motif-video", "single_transformer_blocks.3", {"num_single_layers": (4, 3), "num_decoder_layers": (2, 1)}),
        ("wan-vace", "blocks.2", {"num_layers": (5, 4), "vace_layers": ([0, 2], [0, 1])}),
        (
            "ace-step",
            "layers.0",
            {
                "num_hidden_layers": (4, 3),
                "layer_types": (None, ["full_attention", "sliding_attention", "full_attention"]),
            },
        ),
        (
            "hidream",
            "single_stream_blocks.0",
            {"num_single_layers": (3, 2), "llama_layers": ((0, 1, 2, 3, 4, 5), (0, 1, 2, 4, 5))},
        ),
    ],
)
def test_what_the_config_says_besides_the_depth_is_changed_with_it(
    name: str, path: str, changes: dict[str, Any]
) -> None:
    entry = ZOO[name]
    smaller: Any = flcompress.remove(randomised(entry), [path], entry.draw(0))
    assert smaller.flcompress_certificate.config_changes == changes


@pytest.mark.parametrize(
    ("name", "paths", "cuts"),
    [
        ("bria-fibo", ("transformer_blocks.1",), {"text_encoder_layers": Cut((1,))}),
        ("bria-fibo", ("single_transformer_blocks.2", "transformer_blocks.0"), {"text_encoder_layers": Cut((0, 5))}),
        ("bria-fibo-2", ("layers.1",), {"encoder_hidden_states": Cut((1,), 1)}),  # the first bundle is the resampler's
        ("wan-vace", ("vace_blocks.1",), {"control_hidden_states_scale": Cut((1,), 0)}),
        ("wan-vace", ("blocks.2", "vace_blocks.1"), {"control_hidden_states_scale": Cut((1,), 0)}),
        ("wan-vace", ("blocks.2",), {}),
    ],
)
def test_arguments_with_an_entry_for_every_block_lose_it(
    name: str, paths: tuple[str, ...], cuts: dict[str, Cut]
) -> None:
    entry = ZOO[name]
    model, inputs = randomised(entry), entry.draw(0)
    smaller: Any = flcompress.remove(model, paths, inputs)
    assert smaller.flcompress_certificate.input_cuts == cuts
    assert largest_difference(entry, model, smaller, paths) == 0


def test_certify_decides_every_block() -> None:
    entry = ZOO["wan-vace"]
    graph = certify(randomised(entry), entry.draw(0))
    assert {block.path for block in graph.blocks if block.removable} == set(MATRIX["wan-vace"]["removed"])
    assert {block.path: block.reason for block in graph.blocks if not block.removable} == MATRIX["wan-vace"]["refused"]
