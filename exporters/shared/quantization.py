"""Transformers in 8 bits, by torchao, in the form of safetensors that stock diffusers loads; one file at a time.

What is quantised are the linear layers of the blocks that compute on tokens. Embedders, the final projection and
modulation (layers of a block that read one vector a sample, whose error every token would share), norms and what the
class keeps in fp32 stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.core.records import Quantization
from flcompress.errors import RequestError
from flcompress.files import replacing, write_text
from flcompress.models.configs import read_json
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import loaded_dtype, meta_transformer
from flcompress.models.shards import LiveTensor, file_tensors, write_file
from flcompress.models.stock_files import stock_files
from flcompress.tracing.running import runnable_on_meta

MULTIPLE = 16
"""What both sides of a matrix have to be a multiple of where a GPU multiplies fp8."""


class Layers:
    """The linear layers of a transformer, sorted by whether they are quantised.

    Attributes:
        quantized: patterns of the quantised ones; `*` is the index in a list of blocks.
        others: patterns of those that are not.
    """

    def __init__(self, quantized: Iterable[str], others: Iterable[str]) -> None:
        self.quantized, self.others = sorted(quantized), sorted(others)

    @property
    def rule(self) -> str:
        """The regular expression that the names of the quantised layers match, in torchao's notation."""
        names = "|".join(re.escape(name).replace(r"\*", r"\d+") for name in self.quantized)
        return f"re:(?:{names})"

    def holds(self, tensor: str) -> bool:
        """Tell whether a tensor of that name is the weight of a quantised layer."""
        layer, _, leaf = tensor.rpartition(".")
        return leaf == "weight" and re.fullmatch(self.rule.removeprefix("re:"), layer) is not None


@torch.no_grad()
def layers_of(program: Program, quantization: Quantization) -> Layers:
    """Return the linear layers of a program's transformer; it runs once, on the meta device.

    Raises:
        RequestError: none can be quantised.
    """
    model = meta_transformer(program.components["transformer"])
    stacks = {block.path: block.stack for block in program.graph.blocks}
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    on_tokens: dict[str, bool] = {}

    def note(name: str, tokens: torch.Tensor) -> None:
        on_tokens[name] = tokens.dim() > 2

    for name, layer in linear.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
    with runnable_on_meta():
        model(**example_inputs(model))

    def quantisable(name: str) -> bool:
        island = loaded_dtype(f"{name}.weight", type(model), torch.bfloat16) is torch.float32
        fits = quantization == "int8" or all(size % MULTIPLE == 0 for size in linear[name].weight.shape)
        return on_tokens.get(name, False) and fits and not island

    patterns: dict[str, bool] = {}
    for name in linear:
        block = next((path for path in stacks if name.startswith(f"{path}.")), None)
        pattern = name if block is None else f"{stacks[block]}.*{name.removeprefix(block)}"
        patterns[pattern] = block is not None and quantisable(name) and patterns.get(pattern, True)
    chosen = [pattern for pattern, quantised in patterns.items() if quantised]
    if not chosen:
        sizes = f" whose sizes are multiples of {MULTIPLE}" if quantization == "fp8" else ""
        raise RequestError(
            f"diffusers.quantize: {quantization} given, but the blocks of this {type(model).__name__} have no linear "
            f"layer on tokens{sizes}; leave quantize out"
        )
    return Layers(chosen, patterns.keys() - set(chosen))


def quantize_in(folder: Path, quantization: Quantization, layers: Layers) -> None:
    """Quantise layers of a transformer folder whose weights are in bf16, in place, and say so in its `config.json`.

    Raises:
        ModelError: a file is damaged.
    """
    from diffusers import TorchAoConfig
    from safetensors.torch import load_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import FqnToConfig

    weights, described, names, places = stock_files(folder), dict[str, str](), list[str](), dict[str, str]()
    for file in weights.files:
        tensors = {
            name: _quantized(tensor, quantization) if layers.holds(name) else tensor
            for name, tensor in load_file(file).items()
        }
        flat, metadata = flatten_tensor_state_dict(tensors)
        names += json.loads(metadata.pop("tensor_names"))
        described |= metadata
        places |= dict.fromkeys(flat, file.name)
        with replacing(file) as temporary:
            write_file(temporary, {name: LiveTensor(tensor) for name, tensor in flat.items()})
    described["tensor_names"] = json.dumps(names)
    for file in weights.files:  # diffusers takes each shard's description as that of all
        with replacing(file) as temporary:
            write_file(temporary, file_tensors(file), described)
    if weights.index is not None:
        total = sum(tensor.size for file in weights.files for tensor in file_tensors(file).values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(weights.index, json.dumps(index, indent=2) + "\n")
    config = read_json(folder / "config.json", "a diffusers model folder has one")
    rules = FqnToConfig({layers.rule: _config(quantization)})
    config["quantization_config"] = TorchAoConfig(rules).to_dict()
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def flat_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state of a quantised transformer as its files hold it: numbers and scales by their own names."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return dict(flatten_tensor_state_dict(state)[0])


def _config(quantization: Quantization) -> Any:
    """Return torchao's description of a quantisation."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, PerRow

    if quantization == "int8":
        return Int8WeightOnlyConfig(granularity=PerRow(), version=2)
    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def _quantized(weight: torch.Tensor, quantization: Quantization) -> Any:
    """Return a weight [out, in] with one scale an output channel.

    By torchao's classes and not its `quantize_`, which makes fp8 on a machine with such a GPU only.
    """
    from torchao.quantization import Float8Tensor, Int8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    config = _config(quantization)
    if quantization == "int8":
        return Int8Tensor.from_hp(weight, granularity=config.granularity)
    activations = QuantizeTensorToFloat8Kwargs(config.activation_dtype, config.granularity[0])
    return Float8Tensor.from_hp(
        weight,
        float8_dtype=config.weight_dtype,
        granularity=config.granularity[1],
        mm_config=config.mm_config,
        act_quant_kwargs=activations,
    )
