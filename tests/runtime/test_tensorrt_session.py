"""Sessions of an engine, on stand-ins of the runtime's objects: without a GPU no engine runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flcompress.core.backend import TransformerFiles
from flcompress.core.program import Program
from flcompress.diffusion.contract import contract_of
from flcompress.errors import FlcompressError, RequestError, UnavailableError
from flcompress.exporters.tensorrt_build.profiles import Profile
from flcompress.exporters.tensorrt_engine import TensorRTExporter
from flcompress.runtime import tensorrt_api
from flcompress.runtime.backends.options import choose_backend
from flcompress.runtime.backends.tensorrt_backend import TensorRTBackend
from flcompress.runtime.tensorrt_api import Card
from flcompress.runtime.tensorrt_session import TensorRTSession, profile_for, require_builder
from tests.fixtures import engines
from tests.fixtures.engines import INPUTS, Machine, Strategy, Stream
from tests.fixtures.exports import silent


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def inputs(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    video, text = torch.randn(n, 4, generator=draw), torch.randn(n, 2, generator=draw)
    return {INPUTS[0]: video, INPUTS[1]: text, "never read": torch.zeros(1)}


def expected(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors[INPUTS[0]] + tensors[INPUTS[1]].mean()


def session_of(machine: Machine, folder: Path, *, cuda_graph: bool = False, **stated: Any) -> TensorRTSession:
    manifest = engines.manifest(**stated)
    return TensorRTSession(machine.engine_file(folder, manifest), manifest, cuda_graph=cuda_graph)


def test_each_profile_has_a_context_that_is_kept(machine: Machine, tmp_path: Path) -> None:
    session = session_of(machine, tmp_path)
    (engine,) = machine.engines
    for step, n in enumerate((1, 8, 2, 4, 1, 1)):
        tensors = inputs(n, step)
        torch.testing.assert_close(session(tensors), expected(tensors), rtol=0, atol=1e-6)
    first, second = engine.contexts
    assert (first.profile, first.ran, second.profile, second.ran) == (0, 4, 1, 2)
    message = (
        r"^engine: hidden_states \[3, 4\], encoder_hidden_states \[3, 2\] given, which none of its 2 profiles holds "
        r"\(the nearest, profiles\[1\], takes hidden_states \[4, 4\] to \[8, 4\], encoder_hidden_states \[4, 2\] "
        r"to \[8, 2\]\); generate at a size of"
    )
    with pytest.raises(FlcompressError, match=message):
        session(inputs(3))


def test_what_stays_the_same_is_neither_allocated_nor_copied_again(machine: Machine, tmp_path: Path) -> None:
    session, tensors = session_of(machine, tmp_path), inputs(2)
    first = session(tensors)
    (context,) = machine.engines[0].contexts
    addresses, before = dict(context.addresses), first.clone()
    context.memory(INPUTS[1]).fill_(math.nan)  # seen only if the text is not copied again
    second = session({**tensors, INPUTS[0]: torch.ones(2, 4)})
    assert second.isnan().all()
    assert torch.equal(first, before), "an answer is the caller's own"
    tensors[INPUTS[1]].add_(1.0)  # the same tensor with other numbers
    torch.testing.assert_close(session(tensors), expected(tensors), rtol=0, atol=1e-6)
    assert (context.addresses, context.bound) == (addresses, 3)
    with torch.inference_mode():
        fresh = inputs(2, 5)
        session(fresh)
        fresh[INPUTS[1]].add_(1.0)  # such tensors do not say that they have changed
        torch.testing.assert_close(session(fresh), expected(fresh), rtol=0, atol=1e-6)
    assert Stream.synchronized == 0


def test_a_graph_is_captured_at_the_second_call_with_the_same_shapes(machine: Machine, tmp_path: Path) -> None:
    session = session_of(machine, tmp_path, cuda_graph=True, name="tensorrt")
    for step, n in enumerate((1, 1, 1, 2, 2)):
        tensors = inputs(n, step)
        torch.testing.assert_close(session(tensors), expected(tensors), rtol=0, atol=1e-6)
    assert [graph.replayed for graph in machine.graphs] == [2, 1]
    assert machine.engines[0].contexts[0].config is Strategy.ON_PROFILE_CHANGE


def test_tensorrt_for_rtx_captures_by_itself(machine: Machine, tmp_path: Path) -> None:
    session = session_of(machine, tmp_path, cuda_graph=True)
    session(inputs(1))
    session(inputs(1))
    (context,) = machine.engines[0].contexts
    assert context.config.cuda_graph_strategy is Strategy.WHOLE_GRAPH_CAPTURE
    assert context.config.strategy is Strategy.ON_PROFILE_CHANGE
    assert not machine.graphs


def test_what_tensorrt_for_rtx_compiled_is_kept_beside_the_engine(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "model.engine.cache"

    def content_at_start() -> Any:
        session = session_of(machine, tmp_path)
        session(inputs(1))
        return machine.engines[-1].contexts[0].config.cache.content

    assert content_at_start() == b"kernels:"
    assert file.read_bytes() == b"kernels:k"
    written = file.stat().st_mtime_ns
    assert content_at_start() == b"kernels:k"
    assert file.stat().st_mtime_ns == written, "nothing new, nothing written"
    file.write_bytes(b"of another GPU")
    assert content_at_start() == b"kernels:"
    assert file.read_bytes() == b"kernels:k"


def test_tensorrt_has_no_such_cache(machine: Machine, tmp_path: Path) -> None:
    session_of(machine, tmp_path, name="tensorrt")(inputs(1))
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]


def test_a_cache_that_cannot_be_written_ends_nothing(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "model.engine.cache.tmp").mkdir()
    session_of(machine, tmp_path)(inputs(1))
    assert not (tmp_path / "model.engine.cache").exists()


@pytest.mark.parametrize(
    ("weights", "budget"),
    [(0, None), (800, 800), (950, 40)],
    ids=["not streamed", "all on the GPU", "beside the activations too large"],
)
def test_weights_are_streamed_only_where_they_do_not_fit(
    weights: int, budget: int | None, machine: Machine, tmp_path: Path
) -> None:
    session_of(machine, tmp_path, weights=weights)
    assert machine.engines[0].weight_streaming_budget_v2 == budget


def test_an_engine_that_does_not_run(machine: Machine, tmp_path: Path) -> None:
    session = session_of(machine, tmp_path)
    machine.engines[0].fails = True
    with pytest.raises(FlcompressError, match=r"^engine: it did not run: no reason given$"):
        session(inputs(1))


def test_a_file_that_tensorrt_refuses(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"half")
    with pytest.raises(FlcompressError) as caught:
        TensorRTSession(tmp_path / "model.engine", engines.manifest())
    assert str(caught.value) == (
        f"{tmp_path / 'model.engine'}: tensorrt_rtx 1.2 cannot load it on this GPU (sm89, NVIDIA GeForce RTX 4090): no "
        "reason given; export it again on this machine"
    )


def _other_type(stated: dict[str, Any]) -> None:
    stated["inputs"][1]["dtype"] = "int64"


def _other_name(stated: dict[str, Any]) -> None:
    stated["outputs"][0]["name"] = "video"


def _other_count(stated: dict[str, Any]) -> None:
    stated["shapes"].pop()


def _other_shape(stated: dict[str, Any]) -> None:
    stated["shapes"][1]["max"][INPUTS[0]] = [9, 4]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (_other_type, "encoder_hidden_states is INT64 there and FLOAT in the engine"),
        (_other_name, "sample is no tensor there and FLOAT in the engine"),
        (_other_count, "1 profiles there and 2 in the engine"),
        (
            _other_shape,
            "profile 1 takes hidden_states [[4, 4], [4, 4], [9, 4]] there and [[4, 4], [4, 4], [8, 4]] in the engine",
        ),
    ],
)
def test_a_manifest_of_another_engine(change: Any, difference: str, machine: Machine, tmp_path: Path) -> None:
    file, stated = machine.engine_file(tmp_path, engines.manifest()), engines.manifest()
    change(stated)
    with pytest.raises(RequestError) as caught:
        TensorRTSession(file, stated)
    assert str(caught.value) == (f"{file}: its manifest.json is that of another engine: {difference}; export it again")


def test_the_module_that_built_an_engine_runs_it(machine: Machine, tmp_path: Path) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        session_of(machine, tmp_path, name=name)
    assert machine.loaded == ["tensorrt_rtx", "tensorrt"]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("tensorrt", "pip install 'flcompress[tensorrt]'"),
        ("tensorrt_rtx", "pip install 'flcompress[tensorrt-rtx]'"),
        ("another", "export it again"),
    ],
)
def test_a_module_that_is_not_installed_is_named(
    name: str, fix: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "find_spec", lambda other: object() if other != name else None)
    with pytest.raises(UnavailableError) as caught:
        require_builder(engines.manifest(name), engines.ADA)
    assert str(caught.value) == (
        f"tensorrt: the engine was built by {name}, which is not installed, and no other runs it; {fix}"
    )


def test_an_engine_of_another_version(machine: Machine) -> None:
    with pytest.raises(UnavailableError) as caught:
        require_builder(engines.manifest(builder={"name": "tensorrt_rtx", "version": "1.1"}), engines.ADA)
    assert str(caught.value) == (
        "tensorrt: the engine was built by tensorrt_rtx 1.1, and 1.2 is installed, which does not run it; export it "
        "again, or pip install tensorrt_rtx==1.1"
    )


@pytest.mark.parametrize(
    ("stated", "built_for"),
    [
        ({"targets": ["sm80", "sm89"]}, "sm80, sm89"),
        ({"targets": ["current"], "card": {"name": "RTX 4090", "target": "sm89"}}, "sm89"),
    ],
)
def test_an_engine_of_another_card(stated: dict[str, Any], built_for: str, machine: Machine) -> None:
    hopper = Card("NVIDIA H100 80GB HBM3", "sm90")
    require_builder(engines.manifest(**stated), engines.ADA)
    with pytest.raises(UnavailableError) as caught:
        require_builder(engines.manifest(**stated), hopper)
    assert str(caught.value) == (
        f"tensorrt: the engine was built for {built_for}, and the GPU here is sm90, NVIDIA H100 80GB HBM3; export it "
        "again with tensorrt.targets: [sm90]"
    )


def test_an_engine_for_an_unnamed_card_is_left_to_tensorrt(machine: Machine) -> None:
    require_builder(engines.manifest(targets=["current"]), engines.ADA)  # exports of before had no `card`


def test_a_backend_compares_card_and_builder_before_it_reads_the_engine(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "card_here", lambda: Card("NVIDIA H100 80GB HBM3", "sm90"))
    contract = contract_of({"shift": 3.0}, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16)
    rest: dict[str, Any] = {"bytes": 1, "precision": "bf16", "profiles": [{}, {}], "timesteps": [1.0], "sigmas": [1.0]}
    rest |= {"shift": 3.0, "guidance_scale": 1.0, "contract": contract.to_dict(), "kept": {}, "source": {}}
    rest |= {"checked_on_gpu": False, "difference": None, "tolerance": 0.1, "file": "model.engine", "sha256": "0"}
    (tmp_path / "manifest.json").write_text(json.dumps(engines.manifest(**rest)))
    files = TransformerFiles(stock=tmp_path, export=tmp_path, guidance=None, make_it="make it")
    with pytest.raises(UnavailableError, match=r"^tensorrt: the engine was built for sm89, and the GPU here is sm90"):
        TensorRTBackend().verify(files)
    monkeypatch.setattr(tensorrt_api, "card_here", lambda: engines.ADA)
    with pytest.raises(RequestError, match=r"model\.engine: no such file, but its manifest names it"):
        TensorRTBackend().verify(files)


def test_a_backend_hands_its_options_on(machine: Machine, tmp_path: Path) -> None:
    stated = engines.manifest(name="tensorrt", file="model.engine")
    machine.engine_file(tmp_path, stated)
    session = choose_backend("tensorrt", {"cuda_graph": True}).session(tmp_path, stated)  # type: ignore[attr-defined]
    for _ in range(3):
        session(inputs(1))
    assert [graph.replayed for graph in machine.graphs] == [2]


RANGES = st.tuples(*(st.lists(st.integers(1, 9), min_size=2, max_size=2).map(sorted) for _ in range(2)))


@given(st.lists(RANGES, min_size=1, max_size=4), st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_the_first_profile_that_holds_a_shape(ranges: Any, shape: tuple[int, int]) -> None:
    profiles = [
        {"min": {"x": [low for low, _ in spans]}, "max": {"x": [high for _, high in spans]}} for spans in ranges
    ]
    holding = [
        index
        for index, spans in enumerate(ranges)
        if all(low <= n <= high for n, (low, high) in zip(shape, spans, strict=True))
    ]
    if holding:
        assert profile_for(profiles, {"x": shape}) == holding[0]
    else:
        with pytest.raises(FlcompressError, match=f"none of its {len(ranges)} profiles"):
            profile_for(profiles, {"x": shape})


def test_an_input_with_other_axes_is_in_no_profile() -> None:
    with pytest.raises(FlcompressError, match=r"^engine: hidden_states \[1, 4, 1\] given, which none"):
        profile_for(engines.manifest()["shapes"], {INPUTS[0]: (1, 4, 1)})


@pytest.mark.e2e
def test_the_manifest_of_a_real_engine_chooses_its_profiles(run: Path, program: Program, tmp_path: Path) -> None:
    if not tensorrt_api.installed("tensorrt-rtx"):
        pytest.skip("tensorrt_rtx is not installed")
    profiles = (Profile(batch=(1, 1, 1)), Profile(batch=(2, 2, 4)), Profile(height=(48, 48, 64)))
    exporter = TensorRTExporter(targets=("sm89",), profiles=profiles, stream_weights=True)
    exporter.export(program, tmp_path, run / "exports", silent)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stream_weights"] is True
    for (batch, height), index in {(1, 32): 0, (4, 32): 1, (3, 32): 1, (1, 48): 2}.items():
        shapes = {"hidden_states": (batch, 16, 3, height // 4, 8), "encoder_hidden_states": (batch, 16, 64)}
        assert profile_for(manifest["shapes"], shapes | {"timestep": (batch,)}) == index
