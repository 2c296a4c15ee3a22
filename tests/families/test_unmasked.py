"""HunyuanVideo without its mask, where a batch's prompts have one length: the same result, by kernels without masks."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from flcompress.core.settings import OffloadName
from flcompress.diffusion.network import PROMPT_MASK
from flcompress.errors import RequestError
from flcompress.models.families import family_of
from flcompress.models.families.registry import known_families
from flcompress.models.loading import load_transformer
from flcompress.models.network import as_network, choose_attention, compile_blocks, mask_switch
from flcompress.tracing.counting import listed_blocks
from flcompress.training.engines.replicated import Local
from flcompress.training.shared_base import SharedBase
from tests.fixtures.gaussian import work_in
from tests.fixtures.rounding import relative, require_rounded, rounding

pytestmark = pytest.mark.e2e

NAMES = ("hunyuan-video", "hunyuan-video-i2v-concat", "hunyuan-video-i2v-replace")
SHAPE, TOKENS, LENGTH, REFINER = (2, 4, 4), 16, 8, 1
OPERATIONS = 1_000
"""Of a chain through the tiny models' forward and backward."""

Conditioning = dict[str, torch.Tensor]


@contextmanager
def counted() -> Iterator[Counter[bool]]:
    """Count the calls of attention, by whether they have a mask."""
    stock, calls = torch.nn.functional.scaled_dot_product_attention, Counter[bool]()

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any) -> Any:
        calls[attn_mask is not None] += 1
        return stock(query, key, value, attn_mask, **options)

    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        yield calls


def loaded(folder: Path) -> tuple[Any, torch.Tensor, Conditioning]:
    """Return a transformer, noised latents, and the conditioning of two prompts of one length."""
    model = load_transformer(folder / "transformer").requires_grad_()
    family, draw = family_of(type(model).__name__), torch.Generator().manual_seed(0)
    given = family.example_conditioning(model.config, 2, SHAPE, TOKENS, draw)
    given[PROMPT_MASK][:, LENGTH:] = 0.0
    return model, torch.randn(2, family.channels(model.config), *SHAPE, generator=draw), given


def masked(model: Any) -> Any:
    """Return a copy that keeps its masks."""
    copied = copy.deepcopy(model)
    switch = mask_switch(copied)
    assert switch is not None
    switch.kept = True
    return copied


def results(model: Any, x: torch.Tensor, given: Conditioning) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the prediction, and the gradients of its squares by the latents and all weights in one vector."""
    x = x.detach().requires_grad_()
    prediction = as_network(model)(x, torch.tensor([300.0, 700.0]), given)
    gradients = torch.autograd.grad(prediction.square().mean(), [x, *model.parameters()], allow_unused=True)
    return prediction.detach(), torch.cat([part.flatten() for part in gradients if part is not None])


def test_the_families_that_leave_out_masks_are_named_here() -> None:
    stock = nn.Linear(1, 1)
    assert [family.name for family in known_families() if family.mask_switch(stock)] == ["HunyuanVideo"]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_one_length_need_no_mask(pipeline_folder: Callable[[str], Path], name: str) -> None:
    """In forward and backward; only the refiner of the text, which is small, keeps its own."""
    model, x, given = loaded(pipeline_folder(name))
    with counted() as calls:
        ours = results(model, x, given)
    assert calls == {False: 4, True: REFINER}
    with counted() as calls:
        theirs = results(masked(model), x, given)
    assert calls == {True: 4 + REFINER}
    with_padding = {**given, PROMPT_MASK: torch.ones_like(given[PROMPT_MASK])}
    planted = results(model, x, with_padding)
    for own, stock, wrong in zip(ours, theirs, planted, strict=True):
        require_rounded(own, stock, OPERATIONS, planted=wrong)


@pytest.mark.parametrize("name", NAMES)
def test_other_masks_stay(pipeline_folder: Callable[[str], Path], name: str) -> None:
    """Of prompts of two lengths, of one with a gap, of none: to the last bit as before. Left out they would matter."""
    model, x, given = loaded(pipeline_folder(name))
    lengths, gap = (given[PROMPT_MASK].clone() for _ in range(2))
    lengths[1, 5:] = 0.0
    gap[:, 3] = 0.0
    kept, switch = masked(model), mask_switch(model)
    assert switch is not None
    for mask in (lengths, gap):
        with counted() as calls:
            ours = results(model, x, given | {PROMPT_MASK: mask})
        assert calls == {True: 4 + REFINER}
        theirs = results(kept, x, given | {PROMPT_MASK: mask})
        assert all(map(torch.equal, ours, theirs))
    assert not switch.cut(given | {PROMPT_MASK: torch.zeros_like(lengths)})[1]
    with mock.patch.object(type(switch), "cut", lambda self, conditioning: (conditioning, True)):
        wrong = results(model, x, given | {PROMPT_MASK: lengths})
    right = results(kept, x, given | {PROMPT_MASK: lengths})
    assert relative(wrong[0], right[0]) > 100 * rounding(OPERATIONS)


@pytest.mark.parametrize("how", ["plain", "inputs on the host", "shared"])
def test_blocks_are_recomputed_as_they_were(pipeline_folder: Callable[[str], Path], tmp_path: Path, how: str) -> None:
    """A backward after another forward of the same model, whose prompts differ in length."""
    model, x, given = loaded(pipeline_folder(NAMES[0]))
    offload: tuple[OffloadName, ...] = ("inputs",) if how == "inputs on the host" else ()
    engine = Local(replace(work_in(tmp_path), gradient_checkpointing=True, offload=offload))
    mixed = given | {PROMPT_MASK: given[PROMPT_MASK].clone()}
    mixed[PROMPT_MASK][1, 5:] = 0.0

    def gradients() -> torch.Tensor:
        network, timestep = as_network(model), torch.tensor([300.0, 700.0])
        losses = [network(x, timestep, conditioning).square().mean() for conditioning in (given, mixed, given)]
        parts = torch.autograd.grad(sum(losses[1:], losses[0]), list(model.parameters()), allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    kept_all = gradients()
    engine.checkpoint_blocks(model, SharedBase(model, []).checkpoint if how == "shared" else None)
    with counted() as calls:
        assert relative(gradients(), kept_all) < rounding(OPERATIONS)
    assert calls == {False: 16, True: 8 + 3 * REFINER}  # forward and backward; the refiner is not recomputed


def test_compiled_blocks_keep_their_masks(pipeline_folder: Callable[[str], Path]) -> None:
    """Every length of a prompt would be compiled anew."""
    model, _, given = loaded(pipeline_folder(NAMES[0]))
    switch = mask_switch(model)
    assert switch is not None
    assert switch.cut(given)[1]
    with mock.patch.object(torch, "compile", lambda forward, **_: forward):
        compile_blocks(model, listed_blocks(model))
    assert mask_switch(model) is switch
    assert switch.cut(given) == (given, False)


def test_a_mask_is_read_in_host_memory_only(pipeline_folder: Callable[[str], Path]) -> None:
    model, _, given = loaded(pipeline_folder(NAMES[0]))
    switch = mask_switch(model)
    assert switch is not None
    assert not switch.cut(given | {PROMPT_MASK: given[PROMPT_MASK].to("meta")})[1]


def test_flash_attention_is_that_or_an_error(pipeline_folder: Callable[[str], Path]) -> None:
    """The kernel of torch for the CPU has the same name, and computes in fp32 too."""
    model, x, given = loaded(pipeline_folder(NAMES[0]))
    network, timestep = as_network(model), torch.tensor([300.0, 700.0])
    usual = network(x, timestep, given).detach()
    choose_attention(model, "flash")
    assert relative(network(x, timestep, given).detach(), usual) < rounding(OPERATIONS)
    given[PROMPT_MASK][1, 5:] = 0.0
    message = "training.attention: flash given, but the prompt's mask has a gap or prompts of different lengths are in"
    with pytest.raises(RequestError, match=f"^{message}"):
        network(x, timestep, given)
