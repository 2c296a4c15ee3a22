"""Removal of blocks by translation validation: accepted only when stock diffusers reproduces the skip exactly."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from flcompress.errors import NotRemovable, RequestError
from flcompress.ir.graph import BlockGraph
from flcompress.trace.call import evaluating, first_line, tensors_of
from flcompress.trace.certificate import Certificate
from flcompress.trace.config_keys import BUILD_ERRORS, has_config
from flcompress.trace.rebuild import companions, config_candidates, needs_streams, removed_indices, smaller
from flcompress.trace.skip import require_blocks, skip
from flcompress.trace.tracer import inputs_for, trace

RANDOM_SEED = 0


def remove(model: nn.Module, paths: Iterable[str], inputs: Mapping[str, Any] | None = None) -> nn.Module:
    """A new model of the same class without the blocks at `paths`; `model` stays as it is.

    It is what stock diffusers loads from a folder saved without the blocks, and carries `flcompress_certificate`.
    `inputs` are the keyword arguments to check with: give every optional one that will be used. Takes room for one
    saved copy in the temporary folder and two more copies of the model in memory. Raises RequestError on an unknown
    path, an empty request, a removal of everything, or a model without weights or config; NotRemovable, naming the
    block and the cause, where the result would not be what skipping is.
    """
    name = type(model).__name__
    if not has_config(model) or not hasattr(model, "save_pretrained"):
        raise RequestError(f"{name} is no diffusers model; expected one with from_config and save_pretrained")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RequestError(f"{name} is on the meta device and has no weights to keep; load its weights first")
    inputs = inputs_for(model, inputs)
    graph = trace(model, inputs)
    wanted = require_blocks(graph, paths)
    needs_streams([graph.block(path) for path in wanted])
    kept = graph.renamed(wanted)
    graph.without(wanted)  # refuses to leave nothing
    removed = removed_indices(graph, wanted)
    gone = companions(model, graph, removed)

    probe = copy.deepcopy(model)
    causes: list[str] = []
    config: Any = model.config
    for changes in config_candidates(config, graph, removed):
        # The probe first: with trained or zero-initialised weights a wrong model can look right.
        check = _Check(graph, wanted, inputs, changes, gone)
        _randomise(probe)
        random = check.run(probe, must_differ=True)
        _copy_weights(model, probe)
        own = check.run(probe) if not isinstance(random, str) else random
        if isinstance(random, str) or isinstance(own, str):
            causes.append(own if isinstance(own, str) else str(random))
            continue
        certificate = Certificate(
            model_class=name,
            removed=wanted,
            kept=kept,
            config_changes={key: (config[key], value) for key, value in changes.items()},
            inputs=tuple(inputs),
            max_abs_difference=own[1],
            random_max_abs_difference=random[1],
            diffusers_version=_diffusers_version(),
        )
        result: Any = own[0]
        result.train(model.training)
        result.register_to_config(_name_or_path=config.get("_name_or_path", ""))  # not the temporary folder
        result.flcompress_certificate = certificate
        return own[0]
    raise NotRemovable(f"{_several(wanted)} of {name} cannot be removed: {causes[0]}")


class _Check:
    """One way to write the smaller config, tried on several weights."""

    def __init__(
        self,
        graph: BlockGraph,
        paths: tuple[str, ...],
        inputs: Mapping[str, Any],
        changes: Mapping[str, Any],
        gone: Mapping[str, frozenset[int]],
    ) -> None:
        self._graph, self._paths, self._inputs = graph, paths, inputs
        self._changes, self._gone = changes, gone

    def run(self, model: nn.Module, *, must_differ: bool = False) -> tuple[nn.Module, float] | str:
        """The reloaded model and its distance from the skip, which is 0; a sentence where it is not."""
        built = smaller(model, self._changes, self._gone)
        if isinstance(built, str):
            return built
        loaded = _reloaded(built, model)
        if isinstance(loaded, str):
            return loaded
        with evaluating(model, loaded):
            full = tensors_of(model(**self._inputs)) if must_differ else []
            with skip(model, self._paths, graph=self._graph):
                expected = tensors_of(model(**self._inputs))
            try:
                found = tensors_of(loaded(**self._inputs))
            except BUILD_ERRORS as error:
                return f"the reloaded model fails with {type(error).__name__}: {first_line(error)}"
        if not all(one.isfinite().all() for one in expected):
            return "the output is not finite when they are skipped, so nothing can be compared"
        if must_differ and all(map(torch.equal, full, expected)):
            return "skipping them does not change the output for these inputs, so nothing can be proved"
        if [one.shape for one in expected] != [one.shape for one in found]:
            return "the reloaded model's output has another shape than the skip's"
        if not all(map(torch.equal, expected, found)):
            difference = max(float((one - two).abs().max()) for one, two in zip(expected, found, strict=True))
            return f"the reloaded model differs from the skip by {difference:.3g}, expected 0"
        return loaded, 0.0


def _reloaded(built: Any, like: nn.Module) -> nn.Module | str:
    """`built` saved and loaded by stock diffusers, with the dtypes and device of `like`."""
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
    buffers = {tensor.dtype for tensor in like.buffers() if tensor.is_floating_point()}
    device = next(like.parameters()).device
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(device, built.get_parameter(name).dtype, copy=True)
    for tensor in model.buffers():
        wide = tensor.is_floating_point() and len(buffers) == 1
        tensor.data = tensor.data.to(device, next(iter(buffers)) if wide else tensor.dtype, copy=True)
    return model


def _randomise(probe: nn.Module) -> None:
    """Make every parameter random, so that no branch is silent and no two blocks are alike."""
    generator = torch.Generator("cpu").manual_seed(RANDOM_SEED)
    for name, parameter in probe.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        if parameter.dim() > 1:
            noise *= max(parameter[0].numel(), 1) ** -0.5
        else:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        parameter.data = noise.to(parameter.device, parameter.dtype)


def _copy_weights(model: nn.Module, probe: nn.Module) -> None:
    # Fresh memory, as in `_reloaded`: kernels round differently on weights that lie unaligned in a mapped file.
    for name, parameter in probe.named_parameters():
        parameter.data = model.get_parameter(name).detach().clone()


def _several(paths: tuple[str, ...]) -> str:
    return ", ".join(f"'{path}'" for path in paths)


def _diffusers_version() -> str:
    import diffusers  # late: its import takes seconds

    return str(diffusers.__version__)
