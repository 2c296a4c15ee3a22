"""One frozen transformer that several roles of a training share, each with a LoRA of its own.

Hu et al. 2021, LoRA: a linear layer of a block becomes W x + c B (A x), where only A [rank, in] and B [out, rank] are
trained; B starts at zero. All other parameters are small and each role trains its own copy of them: norms, modulation,
biases, and what is outside the blocks. A, B and these copies are in a module of the role's own, so that each role is an
ordinary trained model to every engine: its parameters, moments and checkpoints are these alone. PEFT puts the LoRAs of
all roles into the one model and chooses between them by a state of that model, which also switches `requires_grad`; a
backward that recomputes blocks would then do so with whichever role was chosen last.
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
"""c: under AdamW, which moves every parameter at one rate, B A then moves as far as a whole weight would."""

OWN_SHARE = 0.02
"""Share of a transformer's parameters that a role has a copy of, for the plan: 1.9 % of Wan 1.3B's, 0.4 % of CogVideoX
5B's."""


class SharedBase:
    """A frozen transformer and the LoRA that it computes with at the moment; without one it is the plain model.

    Args:
        model: frozen; unchanged but for hooks on its linear layers.
        blocks: module paths of the blocks whose linear layers may have LoRAs.

    Attributes:
        model: the same.
        linears: path -> linear layer that may have LoRAs.
        unadapted: path -> parameter of the others, which a role replaces by its own.
    """

    def __init__(self, model: Any, blocks: Iterable[str]) -> None:
        self.model = model
        self._active: LoRA | None = None
        self.blocks = tuple(blocks)
        self.linears = _linears(model, self.blocks)
        for name, module in self.linears.items():
            module.register_forward_hook(self._lora_hook(name))
        self.unadapted = {name: model.get_parameter(name) for name in unadapted(model, self.blocks)}
        self._owners = [(_key(name), *_owner(model, name), plain) for name, plain in self.unadapted.items()]

    @contextmanager
    def using(self, lora: LoRA | None) -> Iterator[None]:
        """While active, the model computes with this LoRA, or with none."""
        # A plain attribute, not a thread's: on a GPU the backward, which may recompute blocks, runs in other threads.
        before, self._active = self._active, lora
        self._put(lora)
        try:
            yield
        finally:
            self._active = before
            self._put(before)

    def _put(self, lora: LoRA | None) -> None:
        for key, module, attribute, plain in self._owners:
            parameter: Any = plain if lora is None else lora.parameter(key, plain)
            module._parameters[attribute] = parameter

    def checkpoint(self, block: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint a block, for diffusers' `enable_gradient_checkpointing`.

        The backward recomputes a block with the LoRA of its forward, whichever role has computed since.
        """
        lora = self._active
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self.using(lora)))

    def _lora_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
            return None if self._active is None else self._active.adapt(name, args[0], output)

        return hook


def unadapted(model: Any, blocks: Iterable[str]) -> list[str]:
    """Return the paths of the parameters that are not the weight of a linear layer in one of the blocks."""
    adapted = {f"{name}.weight" for name in _linears(model, blocks)}
    return [name for name, _ in model.named_parameters() if name not in adapted]


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
        base: the shared base; not a submodule of this module.
        blocks: paths of the base's blocks whose linear layers it adapts.
        rank: rank of A and B, capped at a layer's smaller side.
        seed: seeds the draw of A.
        forward_context: entered for every forward; it skips blocks if the role is the base without them.

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
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        vars(self)["inner"] = base.model  # past nn.Module's registration: the base's weights are not this role's
        self._base, self._forward_context, self._share = base, forward_context, 1.0
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
        absent = tuple(f"{block}." for block in set(base.blocks) - set(blocks))
        for name, parameter in base.unadapted.items():
            if not name.startswith(absent):
                self.own[_key(name)] = nn.Parameter(parameter.detach().float().clone())

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._base.using(self), self._forward_context():
            return vars(self)["inner"](*args, **kwargs)

    @contextmanager
    def leaning(self, share: float) -> Iterator[None]:
        """While active, it is the base with a share of the role: of c B A, and of the way to each own parameter."""
        self._share = share
        try:
            yield
        finally:
            self._share = 1.0

    def adapt(self, name: str, x: Tensor, output: Tensor) -> Tensor:
        """Return the output [..., out] of the linear layer at `name` for x [..., in], plus c B (A x)."""
        key = _key(name)
        if key not in self.lora_A:
            return output
        scale = SCALE * self._share
        return output + F.linear(scale * F.linear(x, self.lora_A[key]), self.lora_B[key]).to(output.dtype)

    def parameter(self, key: str, plain: Tensor) -> Tensor:
        """Return what replaces a parameter of the base: the role's own, if it has one."""
        if key not in self.own:
            return plain
        own: Tensor = self.own[key]
        return own if self._share == 1.0 else torch.lerp(plain.to(own.dtype), own, self._share)


def merge(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a model's weights with a LoRA merged: W + c B A, summed in fp64 and rounded once, and the LoRA's own.

    Args:
        weights: the model's state dict.
        lora: the state dict of a `LoRA`.
        paths: block path in the model -> block path in the LoRA's base.

    Raises:
        KeyError: the model lacks a weight that the LoRA adapts.
    """
    merged = dict(weights)
    own_path = {base: own for own, base in paths.items()}

    def rename(path: str) -> str:
        block = next((base for base in own_path if path.startswith(f"{base}.")), "")
        return f"{own_path[block]}{path[len(block) :]}" if block else path

    for key, tensor in lora.items():
        kind, _, name = key.partition(".")
        if kind == "lora_A":
            here = f"{rename(_path(name))}.weight"
            difference = SCALE * (lora[f"lora_B.{name}"].double() @ tensor.double())
            merged[here] = (weights[here].double() + difference).to(weights[here].dtype)
        elif kind == "own":
            here = rename(_path(name))
            merged[here] = tensor.to(weights[here].dtype)
    return merged


def first_difference(transformer: Path, base: Path, paths: Mapping[str, str]) -> str | None:
    """Return the name of the first tensor that differs between two transformer folders, or None.

    Args:
        transformer: folder of the transformer.
        base: folder of the transformer that it should equal, except for missing blocks.
        paths: block path in the transformer -> block path in the base.
    """
    tensors, base_tensors = folder_tensors(transformer), folder_tensors(base)
    for name, tensor in tensors.items():
        block = next((path for path in paths if name.startswith(f"{path}.")), "")
        other = base_tensors.get(f"{paths[block]}{name[len(block) :]}" if block else name)
        if other is None or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
            return name
        if any(ours != theirs for ours, theirs in zip(tensor.pieces(), other.pieces(), strict=True)):
            return name
    return None


def lora_parameters(parameters: float, blocks: float, rank: int) -> float:
    """Estimate the number of parameters of a `LoRA` on a transformer, for the plan.

    The sides of a block's ten matrices add up to 26 times its width. A role's own copies are assumed to be 2 % of the
    transformer.
    """
    return blocks * rank * 26.0 * width(parameters, blocks) + OWN_SHARE * parameters


def width(parameters: float, blocks: float) -> float:
    """Estimate the width w of a transformer's tokens, for the plan.

    A block is assumed to have 16 w^2 parameters, 4 w^2 in each of two attentions and 8 w^2 in the feed-forward.
    """
    return math.sqrt(parameters / blocks / 16.0)


def _owner(model: Any, name: str) -> tuple[nn.Module, str]:
    """Return (module, attribute) of a parameter."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _key(path: str) -> str:
    # The name of a parameter must not have dots.
    return path.replace(".", "/")


def _path(key: str) -> str:
    return key.replace("/", ".")
