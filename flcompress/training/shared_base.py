"""One frozen transformer that several roles of a training share, each with a LoRA of its own.

Hu et al. 2021, LoRA: a linear layer of a block becomes W x + c B (A x), where only A [rank, in] and B [out, rank] are
trained; B starts at zero. All that is no such weight is small and each role has its own copy, trained whole: norms,
modulation, biases, and what lies outside the blocks. A, B and these copies lie in a module of the role's own, so that
each role is an ordinary trained model to every engine: its parameters, moments and checkpoints are these alone. PEFT
puts the LoRAs of all roles into the one model and chooses between them by a state of that model, which also switches
`requires_grad`; a backward that computes blocks again would then do so with whichever role was chosen last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from flcompress.draws import seed_of
from flcompress.models.shards import folder_tensors

SCALE = 5.0
"""c: under AdamW, which moves every parameter alike, B A then moves as far as a whole weight does at the same rate."""

OWN_SHARE = 0.02
"""Of a transformer's parameters, those that a role has a copy of, for the plan: 1.9 % of Wan 1.3B's, 0.4 % of CogVideoX
5B's."""


class SharedBase:
    """A frozen transformer and which LoRA it computes with at the moment; with none it is the plain model.

    Args:
        model: frozen; stays what it is but for hooks on its linear layers.
        blocks: module paths of the blocks whose linear layers may have LoRAs.

    Attributes:
        model: as given.
        linears: path -> linear layer, of all that may have LoRAs.
        loose: path -> parameter, of all others: a role computes with its own in their place.
    """

    def __init__(self, model: Any, blocks: Iterable[str]) -> None:
        self.model = model
        self._active: LoRA | None = None
        self.blocks = tuple(blocks)
        self.linears = _linears(model, self.blocks)
        for name, module in self.linears.items():
            module.register_forward_hook(self._adding(name))
        self.loose = {name: model.get_parameter(name) for name in loose(model, self.blocks)}
        self._places = [(_key(name), *_place(model, name), one) for name, one in self.loose.items()]

    @contextmanager
    def using(self, lora: LoRA | None) -> Iterator[None]:
        """While active, the model computes with this LoRA, or with none."""
        # A plain attribute: on a GPU the backward, which may compute blocks again, runs in threads of its own.
        before, self._active = self._active, lora
        self._put(lora)
        try:
            yield
        finally:
            self._active = before
            self._put(before)

    def _put(self, lora: LoRA | None) -> None:
        for key, module, attribute, plain in self._places:
            module._parameters[attribute] = plain if lora is None or key not in lora.own else lora.own[key]

    def checkpoint(self, module: nn.Module, *args: Any) -> Any:
        """Gradient checkpointing for diffusers' `enable_gradient_checkpointing`.

        The backward computes a block again with the LoRA of its forward, whichever role has computed since.
        """
        lora = self._active
        return checkpoint(
            module.__call__, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.using(lora))
        )

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            return None if self._active is None else self._active.added(name, args[0], output)

        return hook


def loose(model: Any, blocks: Iterable[str]) -> list[str]:
    """Paths of the parameters that are no linear layer's weight in one of the blocks."""
    held = {f"{name}.weight" for name in _linears(model, blocks)}
    return [name for name, _ in model.named_parameters() if name not in held]


def _linears(model: Any, blocks: Iterable[str]) -> dict[str, nn.Linear]:
    return {
        name: module
        for block in blocks
        for name, module in model.get_submodule(block).named_modules(prefix=block)
        if isinstance(module, nn.Linear)
    }


class LoRA(nn.Module):
    """A role on a shared base: called like the base, it computes with its own A and B.

    Args:
        base: the shared base; no submodule of this one.
        blocks: paths of the base's blocks whose linear layers it adapts.
        rank: of A and B, capped at a layer's smaller side.
        seed: draws A.
        around: entered for every forward; where the role is the base without some blocks, it skips them.

    Attributes:
        inner: the base's model.
    """

    def __init__(
        self,
        base: SharedBase,
        blocks: Iterable[str],
        rank: int,
        *,
        seed: int,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        vars(self)["inner"] = base.model  # past nn.Module's registration: the base's weights are not this role's
        self._base, self._around = base, around
        self.lora_A, self.lora_B, self.own = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        draws = torch.Generator().manual_seed(seed_of(seed, "lora"))
        prefixes = tuple(f"{block}." for block in blocks)
        for name, linear in base.linears.items():
            if name.startswith(prefixes):
                small = min(rank, linear.in_features, linear.out_features)
                bound = 1.0 / math.sqrt(linear.in_features)
                down = torch.empty(small, linear.in_features).uniform_(-bound, bound, generator=draws)
                device = linear.weight.device
                self.lora_A[_key(name)] = nn.Parameter(down.to(device))
                self.lora_B[_key(name)] = nn.Parameter(torch.zeros(linear.out_features, small, device=device))
        left_out = tuple(f"{block}." for block in set(base.blocks) - set(blocks))
        for name, parameter in base.loose.items():
            if not name.startswith(left_out):
                self.own[_key(name)] = nn.Parameter(parameter.detach().float().clone())

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._base.using(self), self._around():
            return vars(self)["inner"](*args, **kwargs)

    def added(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """What the linear layer at `name` gives with this LoRA: its output [..., out] of x [..., in], and c B (A x)."""
        key = _key(name)
        if key not in self.lora_A:
            return output
        return output + F.linear(SCALE * F.linear(x, self.lora_A[key]), self.lora_B[key]).to(output.dtype)


def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of a model with a LoRA merged into them: W + c B A, summed in fp64 and rounded once, and its own.

    Args:
        weights: the model's state dict.
        lora: the state dict of a `LoRA`.
        paths: block path in the model -> block path in the LoRA's base.

    Raises:
        KeyError: the model lacks a weight that the LoRA adapts.
    """
    merged = dict(weights)
    new = {old: here for here, old in paths.items()}

    def place(path: str) -> str:
        block = next((old for old in new if path.startswith(f"{old}.")), "")
        return f"{new[block]}{path[len(block) :]}" if block else path

    for key, tensor in lora.items():
        kind, _, name = key.partition(".")
        if kind == "lora_A":
            here = f"{place(_path(name))}.weight"
            added = SCALE * (lora[f"lora_B.{name}"].double() @ tensor.double())
            merged[here] = (weights[here].double() + added).to(weights[here].dtype)
        elif kind == "own":
            here = place(_path(name))
            merged[here] = tensor.to(weights[here].dtype)
    return merged


def unlike(transformer: Path, base: Path, paths: Mapping[str, str]) -> str | None:
    """Name of the first tensor of a transformer folder that differs from its counterpart in another; None if none does.

    Args:
        transformer: folder of the transformer.
        base: folder of the one that it should be but for missing blocks.
        paths: block path in the transformer -> block path in the base.
    """
    ours, theirs = folder_tensors(transformer), folder_tensors(base)
    for name, tensor in ours.items():
        block = next((here for here in paths if name.startswith(f"{here}.")), "")
        other = theirs.get(f"{paths[block]}{name[len(block) :]}" if block else name)
        if other is None or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return name
        if any(one != two for one, two in zip(tensor.pieces(), other.pieces(), strict=True)):
            return name
    return None


def lora_parameters(parameters: float, blocks: float, rank: int) -> float:
    """About how many parameters a `LoRA` on a transformer has, for the plan.

    A block of width w is taken for 16 w^2 parameters, 4 w^2 in each of two attentions and 8 w^2 in the feed-forward;
    the sides of its ten matrices add up to 26 w. What a role has a copy of is taken for 2 % of the transformer.
    """
    return blocks * rank * 26.0 * math.sqrt(parameters / blocks / 16.0) + OWN_SHARE * parameters


def _place(model: Any, name: str) -> tuple[nn.Module, str]:
    """(module, attribute) of a parameter."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _key(path: str) -> str:
    # The name of a parameter must not have dots.
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
