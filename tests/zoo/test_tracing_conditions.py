"""What a trace is given and leaves behind: models without weights, values that steer, training state, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import flcompress
from flcompress.errors import NotRemovable, RequestError
from tests.zoo import ZOO
from tests.zoo.check import answer, randomised

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]  # stock models warn of much that is not ours]


@pytest.mark.parametrize("inputs_on", ["meta", "cpu"])
@pytest.mark.parametrize("name", ["flux", "mochi", "cosmos-3", "lumina-2", "anyflow-far", "hunyuan-video-15"])
def test_weights_are_not_needed(name: str, inputs_on: str) -> None:
    entry = ZOO[name]
    with torch.device("meta"):
        weightless = entry.build()
    with torch.device(inputs_on):
        inputs = entry.draw(0)
    assert flcompress.trace(weightless, inputs) == flcompress.trace(entry.build(), entry.draw(0))


def test_values_that_steer_must_be_given() -> None:
    # Which tokens are of the image is told by a mask: without its values the sequence has no length.
    entry = ZOO["qwen-image-2.1"]
    with torch.device("meta"):
        weightless, inputs = entry.build(), entry.draw(0)
    with pytest.raises(RequestError, match=r"^QwenImage21Transformer2DModel cannot run on the inputs hidden_states, "):
        flcompress.trace(weightless, inputs)
    assert len(flcompress.trace(weightless, entry.draw(0)).blocks) == 4


def test_a_model_with_weights_is_traced_on_inputs_without() -> None:
    entry = ZOO["wan-t2v"]
    with torch.device("meta"):
        inputs = entry.draw(0)
    assert flcompress.trace(entry.build(), inputs) == flcompress.trace(entry.build(), entry.draw(0))


@pytest.mark.parametrize("name", ["wan-t2v", "omnigen", "z-image", "t5-film"])
def test_nothing_of_the_model_is_changed(name: str) -> None:
    entry = ZOO[name]
    model: Any = entry.build()
    model.get_submodule(next(iter(entry.blocks))).eval()
    if name != "t5-film":
        model.enable_gradient_checkpointing()

    def state() -> list[object]:
        modules = [(one.training, set(vars(one)), len(one._forward_hooks)) for one in model.modules()]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [modules, [(key, id(one), one.sum().item()) for key, one in tensors], dict(model.config)]

    before, random = state(), torch.get_rng_state()
    inputs = entry.draw(0)
    graph = flcompress.trace(model, inputs)
    flcompress.remove(model, [graph.blocks[-1].path], inputs)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_key_left_at_its_default_counts_too() -> None:
    from diffusers.models.transformers.minimax_music3_rvq_depth_decoder import MiniMaxMusic3RVQDepthDecoder

    model: Any = MiniMaxMusic3RVQDepthDecoder(hidden_size=16, num_attention_heads=2, intermediate_size=24)
    assert "num_layers" in model.config["_use_default_values"]
    smaller: Any = flcompress.remove(model, ["layers.1"], {"inputs_embeds": torch.randn(1, 3, 16)})
    assert smaller.config.num_layers == 3


def test_what_the_given_inputs_switch_off_counts_too() -> None:
    # With a scale of zero the control branch adds nothing, and block 0 looks as if it could go.
    entry = ZOO["wan-vace"]
    inputs = {**entry.draw(0), "control_hidden_states_scale": torch.zeros(2)}
    with pytest.raises(NotRemovable, match=r"^'blocks\.0' of WanVACETransformer3DModel cannot be removed: the smaller"):
        flcompress.remove(randomised(entry), ["blocks.0"], inputs)


def test_the_last_trace_is_remembered_and_follows_the_model() -> None:
    entry = ZOO["flux"]
    model: Any = randomised(entry)
    untraced = ZOO["stable-audio"].build()
    message = "StableAudioDiTModel was not traced; call flcompress.trace(model, inputs) once before"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"), flcompress.skip(untraced, ["blocks.0"]):
        pass
    flcompress.trace(model, entry.draw(0))
    del model.transformer_blocks[2]
    with flcompress.skip(model, ["transformer_blocks.1"]):
        answer(model, entry.draw(0))
    message = "FluxTransformer2DModel has no block 'transformer_blocks.2'; nearest: transformer_blocks.1, "
    with pytest.raises(RequestError, match=f"^{re.escape(message)}"), flcompress.skip(model, ["transformer_blocks.2"]):
        pass


def test_a_removed_model_can_be_skipped_at_once() -> None:
    entry = ZOO["stable-audio"]
    smaller = flcompress.remove(randomised(entry), ["transformer_blocks.1"], entry.draw(0))
    full = answer(smaller, entry.draw(0))
    with flcompress.skip(smaller, ["transformer_blocks.2"]):
        assert not torch.equal(answer(smaller, entry.draw(0))[0], full[0])


def test_only_transformers_are_handled() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    nothing: Any = {}
    message = "UNet2DConditionModel is no transformer; only the classes of diffusers.models.transformers are handled"
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        flcompress.trace(unet, {})
    with pytest.raises(RequestError, match=r"^dict is no torch module; expected a transformer, such as a pipeline's"):
        flcompress.trace(nothing, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestep": None}, r"WanTransformer3DModel cannot run on the inputs .*; give the keyword arguments of one "),
        ({"hidden_states": torch.ones(1, 3, 2, 4, 4)}, r"WanTransformer3DModel cannot run on .* RuntimeError: .*chann"),
        ({"wrong": 1}, r"WanTransformer3DModel cannot run .* TypeError: .* unexpected keyword argument 'wrong'; give"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    entry = ZOO["wan-t2v"]
    with pytest.raises(RequestError, match=f"^{message}") as refusal:
        flcompress.trace(entry.build(), {**entry.draw(0), **change})
    assert "\n" not in str(refusal.value)


def test_inputs_are_arguments_by_name() -> None:
    entry = ZOO["wan-t2v"]
    inputs: Any = tuple(entry.draw(0).values())
    with pytest.raises(RequestError, match=r"^inputs of WanTransformer3DModel are a tuple, expected the keyword argu"):
        flcompress.trace(entry.build(), inputs)
