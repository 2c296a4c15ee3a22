"""trace: stacks, streams, flows, counts and config keys of stock models, with weights and without."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flcompress.errors import RequestError
from flcompress.ir.block import TensorSpec
from flcompress.ir.text import to_text
from flcompress.tracing.call import blank, evaluating
from flcompress.tracing.replay import LARGEST_REPLAY
from flcompress.tracing.tracer import trace
from tests.tracing import models
from tests.tracing.models import Case

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", [models.wan, models.hunyuan_video], ids=["wan", "hunyuan_video"])
def test_text_is_the_golden_one(case: Callable[[], Case]) -> None:
    model, inputs = case()
    golden = (GOLDEN / f"{type(model).__name__}.txt").read_text(encoding="utf-8")
    assert to_text(trace(model, inputs)) == golden


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32 autocast, which the CPU lacks
@pytest.mark.parametrize(
    ("case", "keys", "streams"),
    [
        (models.wan, {"blocks": "num_layers"}, ["hidden_states"]),
        (
            models.flux,
            {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
            ["encoder_hidden_states", "hidden_states"],
        ),
        (models.sd3, {"transformer_blocks": "num_layers"}, ["encoder_hidden_states", "hidden_states"]),
        (models.cogvideox, {"transformer_blocks": "num_layers"}, ["hidden_states", "encoder_hidden_states"]),
        (models.ltx_video, {"transformer_blocks": "num_layers"}, ["hidden_states"]),
        (models.mochi, {"transformer_blocks": "num_layers"}, ["hidden_states", "encoder_hidden_states"]),
        (
            models.latte,
            {"transformer_blocks": "num_layers", "temporal_transformer_blocks": "num_layers"},
            ["hidden_states"],
        ),
        (models.wan_vace, {"blocks": "num_layers", "vace_blocks": "vace_layers"}, ["hidden_states"]),
    ],
)
def test_stacks_keys_and_streams(case: Callable[[], Case], keys: dict[str, str], streams: list[str]) -> None:
    model, inputs = case()
    graph = trace(model, inputs)
    assert dict(graph.config_keys) == keys
    assert set(graph.stacks) >= set(keys)
    assert [stream.input for stream in graph.blocks[0].streams] == streams
    assert graph.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert model.training  # as it was


def test_an_output_that_is_none_is_no_stream() -> None:
    last = trace(*models.sd3()).block("transformer_blocks.2")
    assert [(stream.input, stream.output) for stream in last.streams] == [("hidden_states", 1)]
    assert last.outputs == 2


def test_data_flows_from_one_block_to_the_next() -> None:
    graph = trace(*models.wan())
    nodes = ["input", *(block.path for block in graph.blocks), "output"]
    assert list(graph.flows) == list(pairwise(nodes))
    assert graph.flows["blocks.0", "blocks.1"][0].spec == TensorSpec(shape=(1, 48, 24), dtype="float32")


def test_two_lists_interleaved_are_in_the_order_they_run() -> None:
    graph = trace(*models.latte())
    assert [block.path for block in graph.blocks] == [
        "transformer_blocks.0",
        "temporal_transformer_blocks.0",
        "transformer_blocks.1",
        "temporal_transformer_blocks.1",
    ]


def test_weights_are_not_needed() -> None:
    with torch.device("meta"):
        weightless = trace(*models.wan())
    assert weightless == trace(*models.wan())


def test_flops_are_of_one_sample() -> None:
    model, inputs = models.wan()
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    assert trace(model, twice).flops == trace(model, inputs).flops
    with (
        FlopCounterMode(display=False) as counter,
        evaluating(model),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(**inputs)
    assert trace(model, inputs).flops == counter.get_total_flops()


def test_example_inputs_are_found_for_wan() -> None:
    model, _ = models.wan()
    assert len(trace(model).blocks) == 4


def test_the_14b_model_is_traced_without_its_weights() -> None:
    with torch.device("meta"):
        model, inputs = models.wan(
            num_attention_heads=40,
            attention_head_dim=128,
            in_channels=16,
            out_channels=16,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=13824,
            num_layers=40,
        )
        inputs |= {"hidden_states": torch.empty(1, 16, 3, 8, 8), "encoder_hidden_states": torch.empty(1, 8, 4096)}
    graph = trace(model, inputs)
    assert graph.parameters == 14_288_491_584
    assert [block.parameters for block in graph.blocks] == [351_394_304] * 40
    assert graph.blocks[-1].streams[0].input == "hidden_states"
    assert not graph.blocks[-1].reason  # replayed, not guessed
    assert dict(graph.config_keys) == {"blocks": "num_layers"}


class Adder(nn.Module):
    """x + 0 * w, after which nothing is left of the other input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other + self.weight * other


class Toy(nn.Module):
    """A plain module with a list of blocks and no config."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, x.flip(0))
        return x


class Projection(nn.Module):
    """A block that carries nothing on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        projected: Tensor = self.linear(x + other)
        return projected


def test_a_sum_of_two_inputs_is_the_stream_of_the_first() -> None:
    graph = trace(Toy(Adder), {"x": torch.randn(4, 3)})
    assert [stream.input for stream in graph.blocks[0].streams] == ["x"]
    assert not graph.config_keys


def test_huge_inputs_are_matched_by_shape_and_say_so() -> None:
    with torch.device("meta"):
        graph = trace(Toy(Adder), {"x": torch.empty(LARGEST_REPLAY + 1)})
    assert graph.blocks[0].removable is None
    assert graph.blocks[0].reason == (
        "streams matched by shape only: an input has 67,108,865 elements, more than the 67,108,864 that are replayed"
    )


def test_a_model_without_residual_blocks_is_refused() -> None:
    message = "^Toy has no list of residual blocks that each run once; expected a transformer such as"
    with pytest.raises(RequestError, match=message):
        trace(Toy(Projection), {"x": torch.randn(4, 3)})


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, inputs = models.wan()
    del inputs["timestep"]
    message = "^WanTransformer3DModel cannot run on the inputs hidden_states, encoder_hidden_states: .*'timestep'; give"
    with pytest.raises(RequestError, match=message):
        trace(model, inputs)


def test_recording_keeps_no_activation() -> None:
    kept = blank({"x": torch.ones(2), "ids": torch.arange(2)})
    assert not isinstance(kept["x"], Tensor)
    assert isinstance(kept["ids"], Tensor)
