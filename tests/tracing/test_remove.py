"""remove: certified by stock diffusers, or refused with the block and the cause; never wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flcompress.errors import NotRemovable, RequestError
from flcompress.tracing.removal.remove import Certificate, remove
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from tests.tracing import models
from tests.tracing.models import Case, output_of
from tests.tracing.test_tracer import Adder, Toy


@pytest.mark.parametrize(
    ("case", "paths"),
    [
        (models.wan, ["blocks.0"]),
        (models.wan, ["blocks.3", "blocks.1"]),
        (models.wan, ["blocks.0", "blocks.1", "blocks.2"]),
        (models.flux, ["transformer_blocks.0", "single_transformer_blocks.1"]),
        (models.hunyuan_video, ["context_embedder.token_refiner.refiner_blocks.0", "transformer_blocks.1"]),
        (models.cogvideox, ["transformer_blocks.0"]),
        (models.ltx_video, ["transformer_blocks.1"]),
        (models.sd3, ["transformer_blocks.1"]),
        (models.latte, ["transformer_blocks.1", "temporal_transformer_blocks.0"]),
        (models.wan_vace, ["blocks.3"]),
    ],
)
def test_a_certified_removal_is_the_skip(case: Callable[[], Case], paths: list[str]) -> None:
    model, inputs = case()
    graph = trace(model, inputs)
    with skip(model, paths, graph=graph):
        expected = output_of(model, inputs)
    smaller = remove(model, paths, inputs)
    assert torch.equal(output_of(smaller, inputs), expected)
    assert trace(smaller, inputs) == graph.without(paths)
    assert type(smaller) is type(model)
    assert trace(model, inputs) == graph


def test_the_certificate_says_what_was_done() -> None:
    import diffusers

    model, inputs = models.wan()
    model.eval()
    smaller = remove(model, ["blocks.1"], inputs)
    assert smaller.flcompress_certificate == Certificate(
        model_class="WanTransformer3DModel",
        removed=("blocks.1",),
        kept={"blocks.0": "blocks.0", "blocks.2": "blocks.1", "blocks.3": "blocks.2"},
        config_changes={"num_layers": (4, 3)},
        inputs=("hidden_states", "timestep", "encoder_hidden_states"),
        max_abs_difference=0.0,
        random_max_abs_difference=0.0,
        diffusers_version=diffusers.__version__,
    )
    assert torch.equal(
        smaller.get_parameter("blocks.1.ffn.net.2.weight"), model.get_parameter("blocks.2.ffn.net.2.weight")
    )
    assert not smaller.training
    config: Any = smaller.config
    assert "flcompress-certificate" not in str(dict(config))


def test_half_precision_keeps_its_dtypes(tmp_path: Path) -> None:
    model, inputs = models.wan()
    saved: Any = model
    saved.save_pretrained(tmp_path)
    half = saved.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)  # some modules stay in float32
    inputs = {name: tensor if name == "timestep" else tensor.bfloat16() for name, tensor in inputs.items()}
    smaller = remove(half, ["blocks.0"], inputs)
    dtypes = {name: parameter.dtype for name, parameter in half.named_parameters() if not name.startswith("blocks.0.")}
    assert len(set(dtypes.values())) == 2
    assert sorted(map(str, dtypes.values())) == sorted(str(parameter.dtype) for parameter in smaller.parameters())


def test_index_lists_follow_the_blocks_they_name() -> None:
    model, inputs = models.sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm")
    certificate: Any = remove(model, ["transformer_blocks.0"], inputs).flcompress_certificate
    assert certificate.config_changes == {"num_layers": (3, 2), "dual_attention_layers": ((0, 1), (0,))}


def test_a_silent_head_proves_nothing_by_itself() -> None:
    # With a zero head any two models agree: only the random weights can tell them apart.
    model, inputs = models.wan_vace()
    for name, parameter in model.named_parameters():
        if name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    with pytest.raises(NotRemovable, match="the smaller model differs from the skip by"):
        remove(model, ["blocks.0"], inputs)


@pytest.mark.parametrize(
    ("case", "paths", "error", "message"),
    [
        (
            models.wan_vace,
            ["vace_blocks.0"],
            NotRemovable,
            "'vace_blocks.0' of WanVACETransformer3DModel cannot be removed: the smaller config is refused with "
            "ValueError: VACE layers must include layer 0.",
        ),
        (
            models.latte,
            ["transformer_blocks.1"],
            NotRemovable,
            "'transformer_blocks.1' cannot be removed alone: config key 'num_layers' counts 'transformer_blocks' and "
            "'temporal_transformer_blocks', which go only together; ask for as many of each, such as "
            "'transformer_blocks.1', 'temporal_transformer_blocks.1'",
        ),
        (
            models.wan,
            [f"blocks.{index}" for index in range(4)],
            RequestError,
            "all 4 blocks of WanTransformer3DModel were to be removed; keep at least one",
        ),
        (
            models.wan,
            ["blocks.4"],
            RequestError,
            "WanTransformer3DModel has no block 'blocks.4'; nearest: blocks.3, blocks.2, blocks.1",
        ),
        (models.wan, [], RequestError, "no block of WanTransformer3DModel was named; expected at least one path"),
        (
            lambda: (Toy(Adder), {"x": torch.randn(4, 3)}),
            ["blocks.0"],
            RequestError,
            "Toy is no diffusers model; expected one with from_config and save_pretrained",
        ),
    ],
)
def test_refusals(case: Callable[[], Case], paths: list[str], error: type[Exception], message: str) -> None:
    model, inputs = case()
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        remove(model, paths, inputs)


def test_blocks_whose_order_would_change_stay() -> None:
    # Latte runs spatial 0, temporal 0, spatial 1, temporal 1; what is left here would run as spatial 1, temporal 0.
    model, inputs = models.latte()
    with pytest.raises(NotRemovable, match="the smaller model differs from the skip by"):
        remove(model, ["transformer_blocks.0", "temporal_transformer_blocks.1"], inputs)


def test_a_model_without_weights_is_refused() -> None:
    with torch.device("meta"):
        model, inputs = models.wan()
    with pytest.raises(
        RequestError, match=r"^WanTransformer3DModel is on the meta device and has no weights to keep; load"
    ):
        remove(model, ["blocks.0"], inputs)
