"""What two processes hold of a model that an engine splits: together what stock loading gives, each its part."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flcompress.core.steps import PassContext
from flcompress.distributed.world import World
from flcompress.errors import ModelError, TrainingError
from flcompress.ir.serial import from_json, to_json
from flcompress.models.inputs import example_inputs
from flcompress.models.loading import empty_transformer, load_transformer, meta_transformer
from flcompress.models.network import half_precision
from flcompress.models.tensor_memory import Alive
from flcompress.tracing.skip import graph_of
from flcompress.training.engines import Engine, engine_of, fsdp, rounded
from tests.families.pipelines import EXPORTED
from tests.fixtures.tiny import tiny_pipeline
from tests.training import processes

TINY = ("wan-i2v", "hunyuan-video", "cogvideox-i2v", "ltx", "mochi", "flux", "sd3", "qwen-image")


def in_processes(task: Any, engine: str, size: int, *given: Any) -> None:
    """Run `task(engine, *given)` in `size` processes."""
    context, port = processes._context(), processes.free_port()
    started = [
        context.Process(target=_run, args=(task, engine, rank, size, port, given), daemon=True) for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(processes.PATIENCE)
    assert [process.exitcode for process in started] == [0] * size


def _run(task: Any, name: Any, rank: int, size: int, port: int, given: Sequence[Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    work = PassContext(
        directory=Path(),
        seed=0,
        data=lambda program: pytest.fail("no data"),
        progress=lambda *told: None,
        world=World(rank, size),
        engine=name,
        precision="bf16",
    )
    task(engine_of(work), *given)
    dist.barrier()
    dist.destroy_process_group()


def whole(parameter: Any) -> Tensor:
    """A parameter put together from all processes."""
    value: Tensor
    if isinstance(parameter, DTensor):
        value = parameter.full_tensor()
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            value = parameter.detach().clone()
    return value


def part(parameter: Any) -> Tensor:
    """What this process holds of a parameter."""
    own: Tensor = parameter.to_local() if isinstance(parameter, DTensor) else parameter.ds_tensor
    return own


def compare(engine: Engine, folders: Mapping[Path, str]) -> None:
    for folder, graph in folders.items():
        engine._graphs[(folder / "config.json").read_text()] = from_json(graph)  # saves the time of tracing it again
        check(engine.load_trained(folder), load_transformer(folder).requires_grad_(True), engine.context.world.size)
        check(engine.load_frozen(folder), load_transformer(folder, "cpu", torch.bfloat16), engine.context.world.size)


def check(model: nn.Module, stock: nn.Module, size: int) -> None:
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    assert parameters.keys() == dict(stock.named_parameters()).keys()
    assert buffers.keys() == dict(stock.named_buffers()).keys()
    for name, expected in stock.named_parameters():
        found, found_part = whole(parameters[name]), part(parameters[name])
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(found, expected), name
        assert parameters[name].requires_grad == expected.requires_grad, name
        rows = expected[:1].numel()
        assert found_part.numel() <= -(-len(expected) // size) * rows, name
    for name, buffer in stock.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype, name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, str]:
    """The tiny transformer of every family and its graph."""
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name in TINY:
            folder = tmp_path_factory.mktemp(name)
            EXPORTED[name].build().transformer.save_pretrained(str(folder))
            made[folder] = to_json(graph_of(meta_transformer(folder)))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 3), ("zero3", 2)])
def test_the_parts_are_what_stock_loading_gives(engine: str, size: int, folders: dict[Path, str]) -> None:
    in_processes(compare, engine, size, folders)


def compare_gathers(engine: Engine, folders: Mapping[Path, str]) -> None:
    for folder, graph in folders.items():
        engine._graphs[(folder / "config.json").read_text()] = from_json(graph)
        found, seen = updates(engine, folder)
        assert seen
        with mock.patch.object(fsdp, "gather_rounded"):
            expected, exact = updates(engine, folder)
        assert not exact
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), folder.name


def updates(engine: Engine, folder: Path) -> tuple[list[Tensor], bool]:
    """Take two steps of gradient descent; return outputs, gradients and weights, and whether weights were rounded."""
    model, results, seen = engine.load_trained(folder), list[Tensor](), False

    def note(module: nn.Module, args: Any) -> None:
        nonlocal seen
        seen |= any(isinstance(weight, rounded.Rounded) for weight in module.parameters())

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note)
    named = dict(model.named_parameters())
    inputs = example_inputs(load_transformer(folder))
    for _ in range(2):
        with engine.forward_mode():
            output = model(**inputs, return_dict=False)[0]
            output.float().square().mean().backward()
        results.append(output.detach())
        for parameter in named.values():
            if parameter.grad is not None:  # a text branch that no output depends on has none
                results.append(part(parameter.grad).clone())
                part(parameter.detach()).sub_(results[-1], alpha=0.01)
                parameter.grad = None
    return results + [part(parameter).detach() for parameter in named.values()], seen


@pytest.mark.slow
def test_weights_gathered_in_half_precision_change_no_bit(folders: dict[Path, str]) -> None:
    """Of any family's outputs, gradients and weights: autocast rounds what is gathered in fp32 to the same numbers."""
    in_processes(compare_gathers, "fsdp2", 2, folders)


def test_a_rounded_weight_is_read_by_autocast_alone() -> None:
    weight, x = rounded._wrapped(torch.ones(2, 3, dtype=torch.bfloat16)), torch.ones(1, 3)
    with half_precision("cpu", enabled=True):
        assert nn.functional.linear(x, weight).tolist() == [[3.0, 3.0]]
    with pytest.raises(TrainingError, match=r"^training\.engine: fsdp2 gathers .* reads one outside of autocast; set"):
        nn.functional.linear(x, weight)


def count(engine: Engine, folder: Path, out: Path) -> None:
    with Alive(count_stored=True) as alive:
        trained = engine.load_trained(folder)
        first = alive.most
        frozen = engine.load_frozen(folder)
    parts = [sum(part(one).nbytes for one in model.parameters()) for model in (trained, frozen)]
    told = {"first": first, "both": alive.most, "trained": parts[0], "frozen": parts[1]}
    out.with_name(f"{engine.context.world.rank}.json").write_text(json.dumps(told))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_no_process_holds_more_than_its_part_and_a_block(engine: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model", layers=12) / "transformer"
    in_processes(count, engine, 2, folder, tmp_path / "told")
    model = load_transformer(folder)
    whole = sum(one.nbytes for one in model.parameters())
    inside = [sum(one.nbytes for one in block.parameters()) for block in model.blocks]
    more = max(*inside, whole - sum(inside)) * 1.2  # and buffers, and the piece of a file that is being read
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert 0.4 * whole < told["trained"] < 0.6 * whole
        assert told["first"] < told["trained"] + more < whole
        assert told["both"] < told["trained"] + told["frozen"] + more


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    source = tiny_pipeline(tmp_path / "model", layers=2) / "transformer"
    weights = load_transformer(source).state_dict()
    gone, other = "blocks.1.norm2.bias", "blocks.2.norm2.bias"
    for change, message in (
        ({gone: None}, f"1 missing keys, first {gone}; the weights do not belong to this config.json"),
        ({other: weights[gone]}, f"1 unexpected keys, first {other}; the weights do not belong to this config.json"),
        ({gone: weights[gone][:3]}, f"tensor {gone} has shape [3], expected [32]; the weights do not belong to this"),
        ({"norm_added_q": weights[gone]}, ""),  # stock loading ignores it too
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        rewrite(source, folder, weights | change)
        if not message:
            assert empty_transformer(folder)[1].keys() == weights.keys()
            continue
        with pytest.raises(ModelError) as told:
            empty_transformer(folder)
        place = folder / "diffusion_pytorch_model.safetensors" if "shape" in message else folder
        assert str(told.value).startswith(f"{place}: {message}")
        with pytest.raises(ModelError) as stock:
            load_transformer(folder)
        assert str(stock.value) == str(told.value)


def rewrite(source: Path, folder: Path, weights: dict[str, Tensor | None]) -> None:
    """Write a transformer folder of the same configuration with these tensors."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    kept = {name: value.clone() for name, value in weights.items() if value is not None}
    save_file(kept, str(folder / "diffusion_pytorch_model.safetensors"), metadata={"format": "pt"})
