"""Kept blocks that become another kind with the depth: the new last block, which has no text branch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from flcompress.errors import NotRemovable
from flcompress.models.inputs import example_inputs
from flcompress.models.shards import folder_tensors
from flcompress.tracing.removal.on_disk import remove_on_disk
from flcompress.tracing.removal.remove import remove
from flcompress.tracing.removal.sources import Chunks
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from tests.tracing import models
from tests.tracing.models import Case, output_of

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def sd35() -> Case:
    return models.sd3(num_layers=4, dual_attention_layers=(0, 2, 3), qk_norm="rms_norm")


@pytest.mark.parametrize(
    ("case", "paths"),
    [
        (models.sd3, ["transformer_blocks.2"]),
        (sd35, ["transformer_blocks.1", "transformer_blocks.3"]),
        (sd35, ["transformer_blocks.1", "transformer_blocks.2", "transformer_blocks.3"]),
        (lambda: models.mochi(num_layers=3), ["transformer_blocks.2"]),
        (models.mochi, ["transformer_blocks.1"]),
    ],
)
def test_without_its_last_block_a_model_is_the_skip(case: Callable[[], Case], paths: list[str]) -> None:
    model, inputs = case()
    with skip(model, paths, graph=trace(model, inputs)):
        expected = output_of(model, inputs)
    smaller: Any = remove(model, paths, inputs)
    assert torch.equal(output_of(smaller, inputs), expected)
    graph = trace(smaller, inputs)
    assert graph.parameters == sum(parameter.numel() for parameter in smaller.parameters())
    state, names = model.state_dict(), set(smaller.state_dict())
    certificate = smaller.flcompress_certificate
    assert certificate.dropped
    assert all("to_add_out" in name or "ff_context" in name for name in certificate.dropped)
    assert set(certificate.chunked) < names
    for name, chunks in certificate.chunked.items():
        assert torch.equal(smaller.state_dict()[name], chunks.of(state[chunks.name]))


def test_the_scale_comes_before_the_shift() -> None:
    model, inputs = models.sd3()
    certificate: Any = remove(model, ["transformer_blocks.2"], inputs).flcompress_certificate
    name = "transformer_blocks.1.norm1_context.linear"
    assert certificate.chunked == {f"{name}.{kind}": Chunks(f"{name}.{kind}", 6, (1, 0)) for kind in ("weight", "bias")}


class Gated(nn.Module):
    """A residual block with a gated branch, which the last one lacks."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.linear = None if last else nn.Linear(4, 4)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x + self.scale * x.flip(-1)
        return x if self.linear is None else x + gate * self.linear(x)


class GatedTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A toy whose last block is of another kind, which the inputs can hide."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated(last=index == num_layers - 1) for index in range(num_layers))

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x, gate)
        return (x,)


def test_weights_that_an_input_switches_off_are_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedTransformer, "__module__", "diffusers.models.transformers.gated")
    # Whole numbers are not moved, so both models answer the same: only the way from the weights to the output tells.
    inputs = {"x": torch.randn(2, 4), "gate": torch.zeros((), dtype=torch.long)}
    with pytest.raises(NotRemovable, match="has no place for weights: 'blocks"):
        remove(GatedTransformer(), ["blocks.2"], inputs)


@pytest.mark.parametrize("own_weights", [10**9, 0])
@pytest.mark.parametrize("name", ["mochi", "mochi-half"])
def test_rows_are_copied_on_disk(tmp_path: Path, own_weights: int, name: str) -> None:
    model, _ = models.mochi(num_layers=3, num_attention_heads=4, text_embed_dim=304, pooled_projection_dim=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    whole: Any = model.half() if name == "mochi-half" else model
    whole.save_pretrained(str(tmp_path / "model"), max_shard_size="100KB")
    gone = ["transformer_blocks.2"]
    done = remove_on_disk(tmp_path / "model", gone, tmp_path / "small", own_weights=own_weights, largest_shard=60_000)
    assert (done.stand_in is None) == (own_weights > 0)

    stored, written = folder_tensors(tmp_path / "model"), folder_tensors(tmp_path / "small")
    assert set(done.names) == set(written)
    assert len({tensor.file for tensor in written.values()}) > 1
    for new, old in done.names.items():
        old_bytes, new_bytes = (b"".join(tensor.pieces()) for tensor in (stored[old], written[new]))
        # The scale is the first of the four outputs that the text's modulation had.
        rows = slice(0, len(old_bytes) // 4) if new in done.certificate.chunked else slice(None)
        assert new_bytes == old_bytes[rows]
        assert written[new].dtype == stored[old].dtype

    small: Any = type(whole).from_pretrained(str(tmp_path / "small")).eval()
    graph = trace(whole.float(), example_inputs(whole))
    after = done.without(graph)
    assert after.parameters == sum(parameter.numel() for parameter in small.parameters())
    again = trace(small, example_inputs(small))
    assert [block.parameters for block in after.blocks] == [block.parameters for block in again.blocks]
    assert [block.flops for block in after.blocks] == [block.flops for block in again.blocks]
    with skip(whole, gone, graph=graph):
        expected = output_of(whole, example_inputs(whole))
    for parameter in (small := small.float()).parameters():
        parameter.data = parameter.data.clone()  # kernels round differently on weights that lie unaligned
    assert torch.equal(output_of(small, example_inputs(small)), expected)
