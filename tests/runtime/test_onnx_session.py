"""ONNX Runtime behind a session: bound memory, shapes, what is left to the CPU, and what is refused before any work."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.runtime import onnx_providers
from flcompress.runtime.backends.onnx_backend import CACHE_FOLDER, OnnxBackend, cache_folder
from flcompress.runtime.onnx_providers import PROVIDERS, Provider, provider_options, require_onnxruntime
from flcompress.runtime.onnx_session import OnnxSession, left_to_cpu, token_nodes

WIDTH = 4
WEIGHT = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sample = hidden_states @ W + text * timestep, of any batch and tokens; arithmetic on shapes reshapes it."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    shape = ["batch", "tokens", WIDTH]
    nodes = [
        helper.make_node("MatMul", ["hidden_states", "W"], ["mixed"], name="mix"),
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["column"], name="column"),
        helper.make_node("Mul", ["text", "column"], ["scaled"], name="scale"),
        helper.make_node("Unsqueeze", ["scaled", "axis"], ["row"], name="row"),
        helper.make_node("Add", ["mixed", "row"], ["summed"], name="sum"),
        helper.make_node("Shape", ["hidden_states"], ["lengths"], name="shape"),
        helper.make_node("Reshape", ["summed", "lengths"], ["sample"], name="reshape"),
    ]
    inputs = [
        helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["batch"]),
        helper.make_tensor_value_info("text", TensorProto.FLOAT, ["batch", WIDTH]),
    ]
    constants = [
        numpy_helper.from_array(WEIGHT.numpy(), "W"),
        numpy_helper.from_array(np.array([1]), "axes"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    output = [helper.make_tensor_value_info("sample", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", inputs, output, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(made), str(path))
    return path


def inputs_of(batch: int = 1, tokens: int = 3, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, tokens, WIDTH, generator=draw),
        "timestep": torch.rand(batch, generator=draw),
        "text": torch.randn(batch, WIDTH, generator=draw),
        "unread": torch.zeros(1),
    }


def expected(inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["hidden_states"] @ WEIGHT + (inputs["text"] * inputs["timestep"][:, None])[:, None]


def test_bound_memory_gives_what_torch_gives_over_steps_and_sizes(model: Path) -> None:
    """Conditioning stays, latents change, the size changes, two conditionings take turns; no answer is overwritten."""
    session = OnnxSession(model)
    given = [inputs_of(), inputs_of(seed=1), inputs_of(batch=3, tokens=5, seed=2), inputs_of(seed=3)]
    given += [{**given[0], "hidden_states": given[3]["hidden_states"]}, {**given[1], "text": given[0]["text"]}]
    answers = [session(inputs) for inputs in given]
    for inputs, answer in zip(given, answers, strict=True):
        torch.testing.assert_close(answer, expected(inputs))


def test_an_input_that_was_written_to_is_read_anew(model: Path) -> None:
    session, inputs = OnnxSession(model), inputs_of()
    session(inputs)
    inputs["text"].add_(1.0)
    torch.testing.assert_close(session(inputs), expected(inputs))
    wide = torch.randn(1, WIDTH, 3).mT  # strided: copied, and copied again once it was written to
    inputs["hidden_states"] = wide
    torch.testing.assert_close(session(inputs), expected(inputs))
    wide.mul_(2.0)
    torch.testing.assert_close(session(inputs), expected(inputs))


def test_a_copy_is_kept_while_its_input_stays(model: Path) -> None:
    session, first, second = OnnxSession(model), inputs_of(), inputs_of(seed=1)
    for inputs in (first, second):
        inputs["hidden_states"] = inputs["hidden_states"].mT.contiguous().mT
    kept = [session._on_device("hidden_states", one["hidden_states"]) for one in (first, second, first, second)]
    assert kept[0] is kept[2]
    assert kept[1] is kept[3]
    assert kept[0] is not kept[1]


def test_the_output_has_the_shape_that_it_has_not_the_one_declared(model: Path, tmp_path: Path) -> None:
    """Of image to video the graph declares as many channels as its input has."""
    declared = onnx.load(str(model))
    declared.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "batch"
    onnx.save(declared, str(tmp_path / "model.onnx"))
    session = OnnxSession(tmp_path / "model.onnx")
    for seed in range(3):
        inputs = inputs_of(batch=2, tokens=5, seed=seed)
        torch.testing.assert_close(session(inputs), expected(inputs))


def test_inference_tensors_are_bound(model: Path) -> None:
    session = OnnxSession(model)
    with torch.inference_mode():
        inputs = inputs_of()
        torch.testing.assert_close(session(inputs), expected(inputs))


def test_a_shape_outside_the_axes_is_refused_with_the_nearest(model: Path) -> None:
    session, inputs = OnnxSession(model), inputs_of(batch=2)
    with pytest.raises(RequestError) as caught:
        session({**inputs, "text": torch.zeros(2, 6)})
    assert str(caught.value) == (
        f"{model}: text [2, 6] given, but the graph takes ['batch', 4], the nearest of which is [2, 4]; choose the "
        "size that it was exported at"
    )
    with pytest.raises(RequestError, match=r"timestep \[1\] given, but the graph takes \['batch'\], .* is \[2\];"):
        session({**inputs, "timestep": torch.zeros(1)})
    with pytest.raises(RequestError, match=r"text \[2\] given, but the graph takes \['batch', 4\], "):
        session({**inputs, "text": torch.zeros(2)})


def test_a_run_that_fails_is_one_line(model: Path, tmp_path: Path) -> None:
    broken = onnx.load(str(model))
    broken.graph.initializer.append(numpy_helper.from_array(np.array([7, 7]), "seven"))
    next(node for node in broken.graph.node if node.name == "reshape").input[1] = "seven"
    for info in list(broken.graph.value_info):
        broken.graph.value_info.remove(info)
    path = tmp_path / "broken.onnx"
    onnx.save(broken, str(path))
    with pytest.raises(FlcompressError) as caught:
        OnnxSession(path)(inputs_of())
    assert str(caught.value).startswith(f"{path}: ONNX Runtime did not run it on CPUExecutionProvider: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimization", ["all", "basic", "off"])
def test_optimisation_is_a_choice(model: Path, optimization: Any) -> None:
    inputs = inputs_of()
    torch.testing.assert_close(OnnxSession(model, optimization=optimization)(inputs), expected(inputs))


def test_nodes_on_tokens_are_told_from_arithmetic_on_shapes(model: Path) -> None:
    import onnxruntime

    tokens = token_nodes(model)
    assert tokens == {"mix", "row", "sum", "reshape"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(model), options, providers=[PROVIDERS["cpu"]])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not say which provider got each node")
    assigned = [
        (part.ep_name, node.name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    assert sorted(left_to_cpu(assigned, tokens)) == ["Add sum", "MatMul mix", "Reshape reshape", "Unsqueeze row"]
    cuda = PROVIDERS["cuda"]
    assert left_to_cpu([(cuda, "mix", "MatMul"), (PROVIDERS["cpu"], "shape", "Shape")], tokens) == []
    assert left_to_cpu([(PROVIDERS["cpu"], "", "FusedMatMul")], tokens) == ["FusedMatMul"]


def test_a_session_on_a_gpu_that_computes_on_the_cpu_is_refused(model: Path) -> None:
    """As ONNX Runtime does where its CUDA provider has no kernel for an operator."""
    session = OnnxSession(model)
    session.device, session._provider = PROVIDERS["cuda"], "cuda"
    assigned = types.SimpleNamespace(name="mix", op_type="MatMul")
    part = types.SimpleNamespace(ep_name=PROVIDERS["cpu"], get_nodes=lambda: [assigned])
    session.session = types.SimpleNamespace(get_provider_graph_assignment_info=lambda: [part])
    with pytest.raises(UnavailableError) as caught:
        session._require_placement()
    assert str(caught.value) == (
        f"{model}: ONNX Runtime leaves 1 nodes on the clip's tokens to the CPU, not to CUDAExecutionProvider, such as "
        "MatMul mix: their data would be copied there and back at every step; pip install -U "
        "'flcompress[onnxruntime-gpu]', or take --provider cpu"
    )


def test_two_builds_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime", "onnxruntime"]}
    monkeypatch.setattr(onnx_providers, "packages_distributions", lambda: both)
    monkeypatch.setattr(onnx_providers, "version", lambda name: "1.31.1" if name.endswith("gpu") else "1.32.0")
    with pytest.raises(UnavailableError) as caught:
        require_onnxruntime("backend onnx", "cuda")
    assert str(caught.value) == (
        "backend onnx: onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both installed, and pip unpacks them into one "
        "folder, where each overwrites the other; pip uninstall onnxruntime onnxruntime-gpu, then pip install "
        "'flcompress[onnxruntime-gpu]'"
    )


@pytest.mark.parametrize(
    ("provider", "line"),
    [
        (
            "cuda",
            "onnxruntime {version} has no CUDAExecutionProvider; pip uninstall onnxruntime, then pip install "
            "'flcompress[onnxruntime-gpu]'",
        ),
        (
            "tensorrt",
            "onnxruntime {version} has no TensorrtExecutionProvider; pip uninstall onnxruntime, then pip install "
            "'flcompress[onnxruntime-gpu]'",
        ),
        (
            "nv-tensorrt-rtx",
            "onnxruntime_ep_nv_tensorrt_rtx is not installed; pip install 'flcompress[onnxruntime-rtx]'",
        ),
    ],
)
def test_a_provider_that_is_not_in_the_build_names_its_extra(
    provider: Provider, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onnx_providers.installed_builds() != ["onnxruntime"]:
        pytest.skip("this is not plain ONNX Runtime")
    monkeypatch.setattr(onnx_providers, "_has", lambda name: False)
    with pytest.raises(UnavailableError) as caught:
        OnnxBackend(provider=provider).require()
    told = line.format(version=version("onnxruntime"))
    assert str(caught.value) == f"backend onnx: provider {provider} given, but {told}"


def test_a_provider_without_a_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_providers, "_has", lambda name: True)
    monkeypatch.setattr(onnx_providers, "cuda_driver", lambda: False)
    with pytest.raises(UnavailableError) as caught:
        OnnxBackend(provider="tensorrt").require()
    assert str(caught.value) == (
        "backend onnx: provider tensorrt given, but this machine has no CUDA driver, and it runs on an NVIDIA GPU "
        "only; take --provider cpu, or run it on a machine with one"
    )


def test_a_provider_with_a_torch_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this torch has CUDA")
    monkeypatch.setattr(onnx_providers, "_has", lambda name: True)
    monkeypatch.setattr(onnx_providers, "cuda_driver", lambda: True)
    with pytest.raises(UnavailableError, match=f"but torch {re.escape(torch.__version__)} is built without CUDA"):
        OnnxBackend(provider="cuda").require()
    assert onnx_providers.best_provider() == "cpu"


def test_the_cpu_provider_needs_nothing_more() -> None:
    OnnxBackend(provider="cpu").require()
    OnnxBackend().require()


def test_what_a_provider_builds_lies_in_the_export_and_is_named_by_version(tmp_path: Path) -> None:
    import onnxruntime

    assert cache_folder(tmp_path, "cuda") is None
    cache = cache_folder(tmp_path, "tensorrt")
    assert cache == tmp_path / CACHE_FOLDER / f"tensorrt-{onnxruntime.__version__}"
    assert cache.is_dir()
    told = provider_options("tensorrt", "bf16", cache)
    assert told["trt_bf16_enable"] == told["trt_engine_cache_enable"] == told["trt_timing_cache_enable"] == "1"
    assert told["trt_engine_cache_path"] == told["trt_timing_cache_path"] == str(cache)
    assert provider_options("nv-tensorrt-rtx", "bf16", cache) == {"nv_runtime_cache_path": str(cache)}
    (tmp_path / "file").touch()
    assert cache_folder(tmp_path / "file", "tensorrt") is None
