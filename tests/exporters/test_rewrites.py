"""Rewrites of a traced forward change no number, whatever the module is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flcompress.errors import FlcompressError, ModelError
from flcompress.exporters.onnx_graph.rewrites import aten, rewrite
from flcompress.exporters.onnx_graph.write import _translate
from tests.fixtures.rounding import require_rounded

pytestmark = [
    pytest.mark.e2e,
    # torch's own, of torch.export.
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning"),
]


class Interleaved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        out = torch.empty_like(x)
        out[..., 0::2] = a - b.float()
        out[..., 1::2] = a + b.float()
        return out.type_as(x)


class TailFilled(nn.Module):
    """As CogVideoX turns the tokens after the text."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).transpose(1, 2)
        y[:, :, 3:] = y[:, :, 3:] + 1
        return y.relu()


class AliasFilled(nn.Module):
    """Another name for the memory sees the change too: it must not be rewritten away."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x * 2
        y = whole.transpose(1, 2)
        y[:, :, 3:] = y[:, :, 3:] + 1
        return y.relu() + whole.transpose(1, 2)


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tail, head, rest = x.split_with_sizes([x.shape[1] - 3, 1, 2], dim=1)
        return torch.cat((head, rest * 2, tail), dim=1)


class MaskFilled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = x > 0
        return mask.masked_fill(x > 1, False).float() + mask.masked_fill(x < -1, True).float()


class Counted(nn.Module):
    """As HunyuanVideo finds the end of the prompt in its mask."""

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x)
        return ones.sum(dim=1, dtype=torch.int).float() + ones.sum(dtype=torch.float32) + ones.sum(dim=1)


class ComplexRotation(nn.Module):
    """As QwenImage turns queries by a table of cos and sin."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = pairs * torch.view_as_complex(table).unsqueeze(1)
        made: Tensor = torch.view_as_real(turned).flatten(3).type_as(x)
        return made


def traced(module: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    axes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    return torch.export.export(module, (x,), dynamic_shapes=axes, strict=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Interleaved, TailFilled, AliasFilled, Split, MaskFilled, Counted])
def test_no_number_changes(kind: type[nn.Module], dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 6, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = kind()(x)
    program = rewrite(traced(kind(), x))
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.run_decompositions().module()(x), expected)


@pytest.mark.parametrize(("kind", "left"), [(Interleaved, 0), (TailFilled, 0), (AliasFilled, 1)])
def test_copies_in_place_are_gone_where_that_is_safe(kind: type[nn.Module], left: int) -> None:
    program = rewrite(traced(kind(), torch.randn(2, 5, 6, 4)))
    assert sum(node.target is aten.copy_.default for node in program.graph.nodes) == left


def test_no_split_of_varying_size_is_left() -> None:
    program = rewrite(traced(Split(), torch.randn(2, 5, 6, 4)))
    assert not any("split" in str(node.target) for node in program.graph.nodes)


def test_what_is_summed_in_another_type_is_cast_before_the_sum() -> None:
    graph = rewrite(traced(Counted(), torch.ones(2, 257, dtype=torch.bfloat16))).graph
    sums = [node for node in graph.nodes if node.target in (aten.sum.default, aten.sum.dim_IntList)]
    assert [node.args[0].target for node in sums] == [aten.to.dtype, aten.to.dtype, aten.ones_like.default]
    assert [node.args[0].args[1] for node in sums[:2]] == [torch.int32, torch.float32]


def test_complex_products_become_real_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    x, table = torch.randn(2, 5, 3, 4, generator=draw), torch.randn(5, 2, 2, generator=draw)
    expected = ComplexRotation()(x, table)
    program = rewrite(torch.export.export(ComplexRotation(), (x, table), strict=False))
    rotated = program.run_decompositions().module()(x, table)
    other_way = ComplexRotation()(x, table * torch.tensor([1.0, -1.0]))
    require_rounded(rotated, expected, 4, planted=other_way)
    values = [node.meta.get("val") for node in program.run_decompositions().graph.nodes]
    assert not any(value.is_complex() for value in values if isinstance(value, Tensor))


def test_other_complex_arithmetic_is_refused() -> None:
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_complex(x).abs()

    program = torch.export.export(Spectrum(), (torch.randn(3, 4, 2),), strict=False)
    with pytest.raises(ModelError) as caught:
        rewrite(program)
    assert str(caught.value) == (
        "onnx: the forward computes aten.abs.default on complex numbers, which ONNX and TensorRT lack; write it with "
        "real ones (cos and sin), or leave 'onnx' out of exports:"
    )


def test_an_operator_without_a_translation_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = torch.special.bessel_j0(x)
            return made

    program = torch.export.export(Odd(), (torch.randn(3),), strict=False)
    with pytest.raises(FlcompressError) as caught:
        _translate(program, 18)
    assert str(caught.value).startswith(
        f"onnx: torch {torch.__version__} cannot write this forward at opset 18: No ONNX"
    )
    assert "bessel_j0" in str(caught.value)
    assert str(caught.value).endswith("write the operator in plain arithmetic, or leave 'onnx' out of exports:")
    assert "\n" not in str(caught.value)
