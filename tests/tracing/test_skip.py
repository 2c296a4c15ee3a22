"""skip and PrefixMemory: identities while they last, nothing left behind, the same answers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from flcompress.errors import NotRemovable, RequestError
from flcompress.models.network import compile_blocks, missing_compiler
from flcompress.tracing.prefix import remember
from flcompress.tracing.skip import skip
from flcompress.tracing.tracer import trace
from tests.fixtures.rounding import require_rounded
from tests.tracing import models
from tests.tracing.models import Case, output_of
from tests.tracing.test_tracer import Adder, Projection, Toy
from tests.training.comparing import FORWARD

CASES = [models.wan, models.flux, models.hunyuan_video, models.cogvideox, models.sd3]


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_an_identity_only_while_skipped(case: Callable[[], Case]) -> None:
    model, inputs = case()
    graph = trace(model, inputs)
    before = output_of(model, inputs)
    for block in graph.blocks:
        with skip(model, [block.path], graph=graph):
            assert not torch.equal(output_of(model, inputs), before)
    assert torch.equal(output_of(model, inputs), before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_all_blocks_skipped_give_what_the_head_makes_of_the_embedding() -> None:
    model, inputs = models.wan()
    seen = []
    model.get_submodule("blocks.0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.get_submodule("blocks.3").register_forward_hook(lambda _, __, output: seen.append(output))
    with skip(model, [f"blocks.{index}" for index in range(4)]):
        output_of(model, inputs)
    assert torch.equal(seen[-2], seen[-1])


def test_it_is_restored_after_an_error_and_inside_another_skip() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    with skip(model, ["blocks.1"], graph=graph):
        once = output_of(model, inputs)
        with pytest.raises(KeyError), skip(model, ["blocks.1", "blocks.2"], graph=graph):
            raise KeyError
        assert torch.equal(output_of(model, inputs), once)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gradients_flow_past_a_skipped_block_and_not_into_it() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    with skip(model, ["blocks.1"], graph=graph):
        model(**inputs, return_dict=False)[0].square().mean().backward()
    assert model.get_submodule("blocks.0.ffn.net.2").weight.grad is not None
    assert all(parameter.grad is None for parameter in model.get_submodule("blocks.1").parameters())


def test_gradient_checkpointing_gives_arguments_by_position() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    with skip(model, ["blocks.1"], graph=graph):
        expected = output_of(model, inputs)
        model.train()
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)


def test_without_a_graph_the_model_is_traced_once_and_again_when_it_shrinks() -> None:
    model, inputs = models.wan()
    with skip(model, ["blocks.3"]):
        output_of(model, inputs)
    del model.blocks[3]  # type: ignore[operator, union-attr]
    message = "WanTransformer3DModel has no block 'blocks.3'; nearest: blocks.2, blocks.1, blocks.0"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"), skip(model, ["blocks.3"]):
        pass


def test_a_block_without_a_stream_is_refused() -> None:
    model = Toy(Adder)
    model.blocks[0] = Projection()
    graph = trace(model, {"x": torch.randn(4, 3)})
    message = "^'blocks.0' cannot be skipped: output 0 carries no input on$"
    with pytest.raises(NotRemovable, match=message), skip(model, ["blocks.0"], graph=graph):
        pass


@pytest.mark.parametrize("case", CASES)
def test_the_memory_gives_what_a_plain_skip_gives(case: Callable[[], Case]) -> None:
    model, inputs = case()
    graph = trace(model, inputs)
    with remember(model, graph) as memory:
        whole = output_of(model, inputs)
        for block in graph.blocks:
            with memory.skipping(block.path):
                remembered = output_of(model, inputs)
            with skip(model, [block.path], graph=graph):
                assert torch.equal(output_of(model, inputs), remembered)
            # The plain skip was recorded; the full forward must be remembered again.
            assert torch.equal(output_of(model, inputs), whole)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_memory_computes_only_what_follows() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    ran: list[str] = []
    for path in (f"blocks.{index}" for index in range(4)):
        model.get_submodule(f"{path}.ffn").register_forward_hook(lambda *_, path=path: ran.append(path))
    with remember(model, graph) as memory:
        output_of(model, inputs)
        ran.clear()
        with memory.skipping("blocks.2"):
            output_of(model, inputs)
    assert ran == ["blocks.3"]


def test_the_memory_skips_several_blocks_in_any_order() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    with skip(model, ["blocks.1", "blocks.3"], graph=graph):
        expected = output_of(model, inputs)
    with remember(model, graph) as memory:
        output_of(model, inputs)
        with memory.skipping("blocks.3", "blocks.1"):
            assert torch.equal(output_of(model, inputs), expected)
        with skip(model, ["blocks.3"], graph=graph), memory.skipping("blocks.1"):
            assert torch.equal(output_of(model, inputs), expected)
        message = "^'blocks.1' is skipped already and comes before 'blocks.3'; name both in one call$"
        with (
            skip(model, ["blocks.1"], graph=graph),
            pytest.raises(RequestError, match=message),
            memory.skipping("blocks.3"),
        ):
            pass


def test_what_a_skipping_forward_computed_serves_the_full_one_and_its_gradient_stays() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    expected = output_of(model, inputs)

    def gradient(pruned: torch.Tensor) -> torch.Tensor:
        model.zero_grad()
        pruned.square().mean().backward()  # type: ignore[no-untyped-call]
        gradient = model.get_parameter("blocks.0.ffn.net.2.weight").grad
        assert gradient is not None
        return gradient.clone()

    with skip(model, ["blocks.2"], graph=graph):
        plain = gradient(model(**inputs, return_dict=False)[0])
    ran: list[str] = []
    for path in ("blocks.0.ffn", "blocks.1.ffn", "blocks.2.ffn", "blocks.3.ffn"):
        model.get_submodule(path).register_forward_hook(lambda module, given, output, path=path: ran.append(path))
    with remember(model, graph, until="blocks.2") as memory:
        with skip(model, ["blocks.2"], graph=graph):
            pruned = model(**inputs, return_dict=False)[0]
        ran.clear()
        with torch.no_grad(), memory.recalling():
            assert torch.equal(model(**inputs, return_dict=False)[0], expected)
    assert ran == ["blocks.2.ffn", "blocks.3.ffn"]
    assert torch.equal(gradient(pruned), plain)


@pytest.mark.parametrize("case", CASES)
def test_nothing_needs_to_be_remembered_to_skip_from_the_first_block_on(case: Callable[[], Case]) -> None:
    model, inputs = case()
    graph = trace(model, inputs)
    first, last = graph.blocks[0].path, graph.blocks[-1].path
    whole = output_of(model, inputs)
    with skip(model, [first, last], graph=graph):
        expected = output_of(model, inputs)
    with remember(model, graph, until=first) as memory:
        for _ in range(2):
            with memory.skipping(last, first):
                assert torch.equal(output_of(model, inputs), expected)
            with memory.recalling():
                assert torch.equal(output_of(model, inputs), whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own workings
def test_compiled_blocks_can_be_skipped_and_give_the_same_gradients() -> None:
    if missing := missing_compiler():
        pytest.skip(missing)
    model, inputs = models.wan()
    graph = trace(model, inputs)

    def gradients(skipped: str) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with skip(model, [skipped], graph=graph):
            model(**inputs, return_dict=False)[0].square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    plain, other = gradients("blocks.2"), gradients("blocks.1")
    names = list(model.state_dict())
    compile_blocks(model, graph)
    compiled = gradients("blocks.2")
    assert compiled.keys() == plain.keys()
    assert not any(name.startswith("blocks.2.") for name in compiled)
    blocks = [name for name in plain if name in other]  # of blocks that neither skips
    ours, theirs, wrong = (torch.cat([each[name].flatten() for name in blocks]) for each in (compiled, plain, other))
    require_rounded(ours, theirs, 3 * FORWARD, planted=wrong)
    for name, gradient in plain.items():
        require_rounded(compiled[name], gradient, 3 * FORWARD, planted=2.0 * gradient)
    assert list(model.state_dict()) == names


def test_the_memory_refuses_to_answer_for_other_inputs() -> None:
    model, inputs = models.wan()
    graph = trace(model, inputs)
    with remember(model, graph) as memory:
        with (
            pytest.raises(RequestError, match=r"^cannot skip 'blocks\.2': nothing is remembered; run one full forward"),
            memory.skipping("blocks.2"),
        ):
            pass
        output_of(model, inputs)
        inputs["timestep"] = inputs["timestep"] * 2
        with (
            memory.skipping("blocks.2"),
            pytest.raises(RequestError, match=r"^'blocks\.0' was given other inputs than the remembered ones; give"),
        ):
            output_of(model, inputs)


class TwoStreams(torch.nn.Module):
    """Its second stream is open only where `sound` is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Sounding(), Sounding(), Sounding()])

    def forward(self, hidden_states: torch.Tensor, sound: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.blocks:
            hidden_states, sound = block(hidden_states, sound)
        return hidden_states if sound is None else hidden_states + sound.sum()


class Sounding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(4, 4)

    def forward(
        self, hidden_states: torch.Tensor, sound: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return hidden_states + self.mix(hidden_states), None if sound is None else sound + self.mix(sound)


def test_a_stream_that_opens_after_the_trace_is_not_lost_without_a_word() -> None:
    model, picture, sound = TwoStreams(), torch.randn(1, 3, 4), torch.randn(1, 2, 4)
    trace(model, {"hidden_states": picture})
    with skip(model, ["blocks.1"]):
        model(picture)
        with pytest.raises(
            RequestError, match=r"'blocks\.1' cannot be skipped with input 'sound': the model was traced"
        ):
            model(picture, sound=sound)
    assert not model._forward_pre_hooks
    trace(model, {"hidden_states": picture, "sound": sound})
    with skip(model, ["blocks.1"]):
        assert model(picture, sound=sound).shape == picture.shape
