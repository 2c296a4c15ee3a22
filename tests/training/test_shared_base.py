"""Roles that share one frozen model: each computes, and is differentiated, as if it had a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flcompress.models.loading import load_transformer, save_transformer
from flcompress.models.network import half_precision
from flcompress.tracing.skip import graph_of, skip
from flcompress.training.shared_base import OWN_SHARE, SCALE, LoRA, SharedBase, first_difference, lora_parameters, merge

LAYERS, GONE = 4, ("blocks.1", "blocks.2")
DEPTH = tuple(f"blocks.{index}" for index in range(LAYERS))
KEPT = {"blocks.0": "blocks.0", "blocks.1": "blocks.3"}
"""Block in the pruned model -> block in the base."""


def wan(**changes: Any) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "num_layers": LAYERS, "text_dim": 16,
             "freq_dim": 16, "in_channels": 4, "out_channels": 4, "rope_max_seq_len": 32}  # fmt: skip
    return WanTransformer3DModel(**{**sizes, **changes}).eval().requires_grad_(False)


def inputs(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(2, 4, 2, 8, 8, generator=draw),
        "timestep": torch.tensor([200.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 16, generator=draw),
    }


def pruned(model: Any) -> Any:
    """A stock model that has the base's kept blocks and no others."""
    small = wan(num_layers=len(KEPT))
    state = model.state_dict()
    outside = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    inside = {
        here + name[len(old) :]: value
        for here, old in KEPT.items()
        for name, value in state.items()
        if name.startswith(f"{old}.")
    }
    small.load_state_dict({**outside, **inside})
    return small


def lora(base: SharedBase, seed: int, *, generator: bool = False) -> LoRA:
    """A LoRA that differs from the base, on all blocks or as the generator, without the prune set."""
    graph = graph_of(wan())

    @contextmanager
    def around() -> Iterator[None]:
        with skip(base.model, GONE if generator else (), graph=graph):
            yield

    made = LoRA(base, KEPT.values() if generator else DEPTH, 4, seed=seed, forward_context=around)
    draw = torch.Generator().manual_seed(seed)
    for value in made.lora_B.values():
        value.data.normal_(std=0.02, generator=draw)
    for value in made.own.values():
        value.data.add_(0.1 * torch.randn(value.shape, generator=draw))
    return made


class Copy:
    """The reference: a full copy of a model with what a LoRA adds and replaces, differentiated through both."""

    def __init__(self, model: Any, like: LoRA, paths: dict[str, str]) -> None:
        self._model = copy.deepcopy(model)
        self.lora = {name: value.detach().clone().requires_grad_() for name, value in like.named_parameters()}
        self._paths = paths

    def __call__(self, given: dict[str, Tensor]) -> Tensor:
        weights = dict(self._model.state_dict())
        new = {old: here for here, old in self._paths.items()}
        for key, down in self.lora.items():
            if key.startswith("lora_A."):
                path = key.removeprefix("lora_A.").split("/")
                place = ".".join([new[".".join(path[:2])], *path[2:], "weight"])
                weights[place] = weights[place] + SCALE * self.lora[key.replace("lora_A.", "lora_B.")] @ down
            elif key.startswith("own."):
                path = key.removeprefix("own.").split("/")
                block = ".".join(path[:2])
                weights[".".join([new.get(block, block), *path[2:]])] = down
        output: Tensor = torch.func.functional_call(self._model, weights, (), {**given, "return_dict": False})[0]
        return output


def crossed(generate: Any, fake: Any, real: Any) -> Tensor:
    """Forwards and backwards of the roles in one another's midst, more entangled than in any training step."""
    first = generate(inputs(1))
    critic = fake({**inputs(2), "hidden_states": first.detach()})
    with torch.no_grad():
        real({**inputs(3), "hidden_states": first.detach()})
    through = fake({**inputs(4), "hidden_states": first})  # the generator's loss may also go through the fake score
    second = generate(inputs(5))
    critic.square().mean().backward()
    with torch.no_grad():
        judged = real(inputs(6))
    (first.square().mean() + through.square().mean() + (second - judged).square().mean()).backward()
    total: Tensor = first.detach().sum() + critic.detach().sum() + second.detach().sum() + judged.sum()
    return total


def shared(checkpointing: str) -> tuple[Any, LoRA, LoRA, Tensor]:
    """(base model, generator, fake score, sum of outputs) after `crossed` on a shared base."""
    model = wan()
    base = SharedBase(model, DEPTH)
    generate, fake = lora(base, 1, generator=True), lora(base, 2)
    if checkpointing == "ours":
        model.enable_gradient_checkpointing(base.checkpoint)
    elif checkpointing == "stock":
        model.enable_gradient_checkpointing()
    total = crossed(
        lambda given: generate(**given, return_dict=False)[0],
        lambda given: fake(**given, return_dict=False)[0],
        lambda given: model(**given, return_dict=False)[0],
    )
    return model, generate, fake, total


@pytest.mark.parametrize("checkpointing", ["none", "ours"])
def test_gradients_are_those_of_separate_full_copies(checkpointing: str) -> None:
    model, generate, fake, total = shared(checkpointing)
    plain = wan()
    one, two = Copy(pruned(plain), generate, KEPT), Copy(plain, fake, {path: path for path in DEPTH})
    expected = crossed(one, two, lambda given: plain(**given, return_dict=False)[0])
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for role, reference in ((generate, one), (fake, two)):
        gradients = {name: value.grad for name, value in role.named_parameters()}
        assert gradients.keys() == reference.lora.keys()
        for name, gradient in gradients.items():
            found = reference.lora[name].grad
            assert gradient is not None
            assert found is not None
            assert bool((found != 0).any()), name
            torch.testing.assert_close(gradient, found, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_that_forgets_the_role_would_be_found() -> None:
    """The test above can fail: stock checkpointing computes blocks again without the LoRA of their forward."""
    from torch.utils.checkpoint import CheckpointError

    with pytest.raises(CheckpointError):
        shared("stock")


def test_a_new_lora_changes_nothing_and_leaves_the_base_alone() -> None:
    model = wan()
    given = inputs(0)
    before = model(**given, return_dict=False)[0]
    base = SharedBase(model, DEPTH)
    assert torch.equal(LoRA(base, DEPTH, 4, seed=0)(**given, return_dict=False)[0], before)
    assert not torch.equal(lora(base, 1)(**given, return_dict=False)[0], before)
    assert torch.equal(model(**given, return_dict=False)[0], before)


def test_a_lora_owns_its_own_parameters_alone() -> None:
    model = wan()
    made = LoRA(SharedBase(model, DEPTH), ["blocks.0", "blocks.3"], 400, seed=0)
    # Ten linear layers a block, ranks capped at the 32 of the smaller side.
    assert len(made.lora_A) == len(made.lora_B) == 2 * 10
    assert {tuple(value.shape) for value in made.lora_A.values()} == {(32, 32), (32, 64)}
    # A copy of everything else, but for blocks that it does without.
    own = {name.replace("/", ".") for name in made.own}
    assert {name for name in own if not name.startswith("blocks.")} == {
        name for name, _ in model.named_parameters() if not name.startswith("blocks.")
    }
    assert {name for name in own if name.startswith("blocks.0.")} == {
        name for name, value in model.named_parameters() if name.startswith("blocks.0.") and value.ndim != 2
    }
    assert not any(name.startswith(GONE) for name in own)
    assert set(made.state_dict()) == {name for name, _ in made.named_parameters()}


def test_a_base_in_bf16_is_trained_in_fp32() -> None:
    half_base = wan()
    for linear in SharedBase(half_base, DEPTH).linears.values():  # stock loading keeps norms and tables in fp32
        linear.to(torch.bfloat16)
    whole, base = lora(SharedBase(wan(), DEPTH), 1), SharedBase(half_base, DEPTH)
    made = lora(base, 1)
    assert {value.dtype for value in made.parameters()} == {torch.float32}
    with half_precision("cpu", enabled=True):
        half = made(**inputs(0), return_dict=False)[0]
    half.float().square().mean().backward()
    assert all(value.grad is not None and bool(value.grad.isfinite().all()) for value in made.parameters())
    torch.testing.assert_close(half.float(), whole(**inputs(0), return_dict=False)[0], rtol=0.1, atol=0.1)


def test_the_merged_model_is_the_trained_one_without_the_prune_set(tmp_path: Path) -> None:
    model = wan()
    generate = lora(SharedBase(model, DEPTH), 1, generator=True)
    small = pruned(model)
    small.save_pretrained(tmp_path / "small")
    weights = merge(small.state_dict(), generate.state_dict(), KEPT)
    save_transformer(tmp_path / "small", weights, tmp_path / "merged")
    merged = load_transformer(tmp_path / "merged")
    assert len(merged.blocks) == 2
    for seed in range(3):
        with torch.no_grad():
            expected = generate(**inputs(seed), return_dict=False)[0]
            found = merged(**inputs(seed), return_dict=False)[0]
        assert float((found - expected).abs().max()) < 1e-6


def test_another_start_than_the_base_is_noticed(tmp_path: Path) -> None:
    model = wan()
    model.save_pretrained(tmp_path / "base")
    small = pruned(model)
    small.save_pretrained(tmp_path / "small")
    assert first_difference(tmp_path / "small", tmp_path / "base", KEPT) is None
    assert first_difference(tmp_path / "small", tmp_path / "base", {**KEPT, "blocks.1": "blocks.2"}) is not None
    small.blocks[1].ffn.net[2].weight.data[0, 0] += 1e-6
    small.save_pretrained(tmp_path / "other")
    assert first_difference(tmp_path / "other", tmp_path / "base", KEPT) == "blocks.1.ffn.net.2.weight"


@pytest.mark.parametrize(("heads", "ffn", "layers"), [(12, 8960, 30), (40, 13824, 40)])
def test_the_plan_knows_about_how_many_parameters_a_lora_has(heads: int, ffn: int, layers: int) -> None:
    with torch.device("meta"):
        model = wan(num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, num_layers=layers)
        made = LoRA(SharedBase(model, [f"blocks.{index}" for index in range(layers)]), ["blocks.0"], 32, seed=0)
    a_block = [*made.lora_A.values(), *made.lora_B.values()]
    exact = layers * sum(value.numel() for value in a_block)
    inside = sum(value.numel() for value in model.blocks.parameters())
    assert lora_parameters(inside, layers, 32) - OWN_SHARE * inside == pytest.approx(exact, rel=0.05)


def test_a_lora_adds_five_times_its_product() -> None:
    """W x + 5 B (A x): an AdamW step then moves a layer as far as it moves a whole weight; merged alike."""
    base = SharedBase(wan(), DEPTH)
    made = lora(base, 1)
    name = "blocks.2.ffn.net.2"
    down, up = made.lora_A[name.replace(".", "/")].data, made.lora_B[name.replace(".", "/")].data
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    output = torch.zeros(3, 32)
    torch.testing.assert_close(made.adapt(name, x, output), 5.0 * x @ down.T @ up.T)
    weights = base.model.state_dict()
    merged = merge(weights, made.state_dict(), {path: path for path in DEPTH})
    torch.testing.assert_close(merged[f"{name}.weight"], weights[f"{name}.weight"] + 5.0 * up @ down)
    assert torch.equal(made.adapt("blocks.9.ffn.net.2", x, output), output)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_lora_that_leans_is_the_base_with_a_share_of_it(share: float) -> None:
    """W + a c B A and w + a (own - w), as in a model of these weights; nothing and all of it are exact."""
    base = SharedBase(wan(), DEPTH)
    plain = {name: value.clone() for name, value in base.model.state_dict().items()}
    made = lora(base, 1)
    with torch.no_grad():
        before, whole = (call(**inputs(0), return_dict=False)[0] for call in (base.model, made))
        with made.leaning(share):
            found = made(**inputs(0), return_dict=False)[0]
        after = made(**inputs(0), return_dict=False)[0]
    part = {key: value * share if key.startswith("lora_B.") else value for key, value in made.state_dict().items()}
    for key in made.own:
        part[f"own.{key}"] = plain[key.replace("/", ".")].lerp(made.own[key].detach(), share)
    model = wan()
    model.load_state_dict(merge(plain, part, {path: path for path in DEPTH}))
    with torch.no_grad():
        expected = model(**inputs(0), return_dict=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(after, whole)
    assert share not in (0.0, 1.0) or torch.equal(found, whole if share else before)
    assert all(torch.equal(value, plain[name]) for name, value in base.model.state_dict().items())


def test_what_a_role_has_a_copy_of_is_about_two_percent() -> None:
    with torch.device("meta"):
        sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
        model = wan(**sizes, text_dim=4096, freq_dim=256, in_channels=16, out_channels=16, rope_max_seq_len=1024)
        blocks = [f"blocks.{index}" for index in range(30)]
        made = LoRA(SharedBase(model, blocks), blocks, 32, seed=0)
    own, whole = (sum(value.numel() for value in values) for values in (made.own.values(), model.parameters()))
    assert own / whole == pytest.approx(0.02, abs=0.004)
    assert lora_parameters(float(whole), 30, 0) == pytest.approx(own, rel=0.2)
