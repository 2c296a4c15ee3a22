"""Translation validation: the smaller model, saved and loaded by stock diffusers, outputs the same as the skip."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flcompress.ir.graph import BlockGraph
from flcompress.models.configs import BUILD_ERRORS
from flcompress.tracing.call import FORWARD_ERRORS, evaluating, first_line, tensors_of
from flcompress.tracing.removal.candidates import Candidate, Candidates
from flcompress.tracing.removal.cuts import cut_inputs
from flcompress.tracing.removal.sources import Indices, state_from
from flcompress.tracing.skip import skip

RANDOM_SEED = 0
PARTNERS = 8  # how many blocks are tried as the partner of one that cannot go alone


class Prover:
    """Searches for a candidate with which a removal is exact.

    It tries random weights first: with trained or zero-initialised ones a wrong model can look right. They take one
    more copy of the model, made on first use.
    """

    def __init__(self, model: nn.Module, graph: BlockGraph, inputs: Mapping[str, Any]) -> None:
        self._model, self._graph, self._inputs = model, graph, dict(inputs)
        self._probe: nn.Module | None = None
        self._candidates = Candidates(model, graph, inputs)

    def candidate_for(self, paths: tuple[str, ...], removed: Mapping[str, Indices]) -> Candidate | str:
        """Return the candidate that removes `paths`; if there is none, the fault of the plainest one as a sentence."""
        cause = ""
        expectations = self._expectations(paths)
        if isinstance(expectations, str):
            return expectations
        for candidate in self._candidates.without(removed):
            fault = candidate if isinstance(candidate, str) else self._refute(candidate, expectations, paths)
            if not fault and not isinstance(candidate, str):
                return candidate
            cause = cause or str(fault)
        return cause

    def smaller(self, paths: tuple[str, ...], candidate: Candidate) -> nn.Module | str:
        """Return the smaller model with its own weights, loaded by stock diffusers, or how it differs from the skip."""
        smaller = candidate.model
        probe = self._random()
        for name, parameter in probe.named_parameters():
            # Fresh memory, as in `_reload`: kernels round differently on weights that are unaligned in a mapped file.
            parameter.data = self._model.get_parameter(name).detach().clone()
        self._probe = None
        smaller.load_state_dict(state_from(probe.state_dict(), candidate.sources), assign=True)
        loaded = _reload(smaller, probe)
        if isinstance(loaded, str):
            return loaded
        with evaluating(probe, loaded):
            with skip(probe, paths, graph=self._graph):
                expected = tensors_of(probe(**self._inputs))
            return _mismatch(loaded, cut_inputs(self._inputs, candidate.cuts), expected) or loaded

    def partner(self, paths: tuple[str, ...], stack: str) -> str:
        """Return a block of the same list that can go with `paths`, nearest or mirrored first; "" if there is none."""
        depth = len(self._graph.stacks[stack])
        indices = [self._graph.block(path).index for path in paths]

        def distance(index: int) -> int:
            return min(min(abs(own - index), abs(own + index - depth + 1)) for own in indices)

        for index in sorted(set(range(depth)) - set(indices), key=distance)[:PARTNERS]:
            path = f"{stack}.{index}"
            if len(paths) + 1 < len(self._graph.blocks) and self._graph.block(path).streams:
                removed = {stack: frozenset([*indices, index])}
                if not isinstance(self.candidate_for((*paths, path), removed), str):
                    return path
        return ""

    def _expectations(self, paths: tuple[str, ...]) -> list[tuple[dict[str, Any], list[Tensor]]] | str:
        """Return the random probe's outputs with `paths` skipped, for the inputs and for slightly perturbed ones.

        This also exercises branches that the inputs disable, such as by a scale of zero.
        """
        model = self._random()
        with evaluating(model):
            full = tensors_of(model(**self._inputs))
            with skip(model, paths, graph=self._graph):
                expected = tensors_of(model(**self._inputs))
                if not all(tensor.isfinite().all() for tensor in expected):
                    return "the output is not finite when they are skipped, so nothing can be compared"
                if all(map(torch.equal, full, expected)):
                    return "skipping them does not change the output for these inputs, so nothing can be proved"
                perturbed = _perturb(self._inputs)
                try:
                    perturbed_output = tensors_of(model(**perturbed))
                except FORWARD_ERRORS:  # invalid for this model: values must be whole numbers, or within a range
                    return [(self._inputs, expected)]
        finite = all(tensor.isfinite().all() for tensor in perturbed_output)
        return [(self._inputs, expected), *([(perturbed, perturbed_output)] if finite else [])]

    def _refute(
        self, candidate: Candidate, expectations: list[tuple[dict[str, Any], list[Tensor]]], paths: tuple[str, ...]
    ) -> str:
        """Return how the candidate with random weights differs from the skip; "" if it does not."""
        smaller, probe = candidate.model, self._random()
        smaller.load_state_dict(state_from(probe.state_dict(), candidate.sources), assign=True)
        _match_buffers(smaller, probe)
        with evaluating(smaller):
            for inputs, expected in expectations:
                fault = _mismatch(smaller, cut_inputs(inputs, candidate.cuts), expected)
                if fault:
                    return fault
        return self._missing_weight(candidate, paths)

    def _missing_weight(self, candidate: Candidate, paths: tuple[str, ...]) -> str:
        """Return the fault that the candidate lacks a weight on which the output with `paths` skipped depends; or "".

        It is not enough that a weight does not change the output for these inputs: no path of the computation may lead
        from it to the output.
        """
        probe = self._random()
        chunked = {source.name: source for source in candidate.chunked.values()}
        parameters = dict(probe.named_parameters())
        names = [name for name in (*candidate.unused, *chunked) if name in parameters]
        if not names:
            return ""
        with evaluating(probe), skip(probe, paths, graph=self._graph), torch.enable_grad():
            for name in names:
                parameters[name].requires_grad_(True)
            answers = [answer for answer in tensors_of(probe(**self._inputs)) if answer.requires_grad]
            if not answers:
                return ""
            total = torch.stack([answer.double().sum() for answer in answers]).sum()
            gradients = torch.autograd.grad(total, [parameters[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            parts = gradient.chunk(chunked[name].count) if gradient is not None and name in chunked else [gradient]
            used = chunked[name].order if name in chunked else ()
            unused = [part for position, part in enumerate(parts) if position not in used]
            if any(part is not None and (name not in chunked or part.any()) for part in unused):
                return f"the smaller model has no place for '{name}', which the output depends on"
        return ""

    def _random(self) -> nn.Module:
        if self._probe is None:
            self._probe = copy.deepcopy(self._model)
            _randomise(self._probe)
        return self._probe


def _perturb(inputs: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator("cpu").manual_seed(RANDOM_SEED)

    def move(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator, device="cpu")
        return value + 0.1 * noise.to(value.device, value.dtype)

    perturbed: dict[str, Any] = tree_map_only(Tensor, move, inputs)
    return perturbed


def _mismatch(model: nn.Module, inputs: dict[str, Any], expected: list[Tensor]) -> str:
    """Return how the smaller model's output on `inputs` differs from `expected`; "" if it does not."""
    try:
        actual = tensors_of(model(**inputs))
    except FORWARD_ERRORS as error:
        return f"the smaller model fails with {type(error).__name__}: {first_line(error)}"
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        return "the smaller model's output has another shape than the skip's"
    if not all(map(torch.equal, expected, actual)):
        difference = max(float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True))
        return f"the smaller model differs from the skip by {difference:.3g}, expected 0"
    return ""


def _reload(built: Any, like: nn.Module) -> nn.Module | str:
    """Save `built` and load it by stock diffusers, with the dtypes and device of `like`; a sentence on failure."""
    dtypes = {parameter.dtype for parameter in like.parameters()}
    # Half precision would round what the model keeps in float32.
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    with tempfile.TemporaryDirectory(prefix="flcompress-certificate-") as folder:
        built.save_pretrained(folder, safe_serialization=True)
        try:
            loaded, info = type(built).from_pretrained(folder, output_loading_info=True, torch_dtype=dtype)
        except (*BUILD_ERRORS, OSError) as error:
            return f"stock diffusers cannot load the smaller model: {type(error).__name__}: {first_line(error)}"
    for fault, names in info.items():
        if names:
            return f"stock diffusers reports {fault.replace('_', ' ')} for the smaller model: {names[0]}"
    model: nn.Module = loaded
    device = next(like.parameters()).device
    # Copies, because kernels round differently on weights that are unaligned in a mapped file.
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(device, built.get_parameter(name).dtype, copy=True)
    _match_buffers(model, like)
    return model


def _match_buffers(model: nn.Module, like: nn.Module) -> None:
    """Move the buffers to the device of `like`, and to the dtype of its buffers if they share one."""
    dtypes = {tensor.dtype for tensor in like.buffers() if tensor.is_floating_point()}
    device = next(like.parameters()).device
    for tensor in model.buffers():
        wide = tensor.is_floating_point() and len(dtypes) == 1
        tensor.data = tensor.data.to(device, next(iter(dtypes)) if wide else tensor.dtype, copy=True)


def _randomise(probe: nn.Module) -> None:
    """Make every parameter random, so that no branch is silent and no two blocks are equal."""
    generator = torch.Generator("cpu").manual_seed(RANDOM_SEED)
    for name, parameter in probe.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        if parameter.dim() > 1:
            noise *= max(parameter.numel() // max(len(parameter), 1), 1) ** -0.5
        else:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        parameter.data = noise.to(parameter.device, parameter.dtype)
