"""A tiny program, cut to two of three blocks and sampled in four steps, and its exports; made once a session."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flcompress.diffusion.contract import contract_of
from flcompress.diffusion.student import student_contract
from flcompress.exporters.diffusers_folder import DiffusersExporter
from flcompress.exporters.onnx_model import OnnxExporter
from flcompress.models import example_inputs
from flcompress.models.folder import read_json
from flcompress.models.loading import load_transformer
from flcompress.pipeline.program import Fact, Program
from flcompress.trace.tracer import trace
from tests.tiny import tiny_pipeline


def silent(done: int, total: int, values: object) -> None:
    assert 0 <= done <= total


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tiny_pipeline(tmp_path_factory.mktemp("model") / "pipeline", layers=2)
    transformer = load_transformer(folder / "transformer")
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    teacher = contract_of(
        read_json(folder / "scheduler" / "scheduler_config.json", ""),
        num_inference_steps=50,
        guidance_scale=4.0,
        max_sequence_length=16,
    )
    return Program(
        graph=trace(transformer, example_inputs(transformer)),
        index=read_json(folder / "model_index.json", ""),
        latents=(16, 3, 8, 8),
        components={name: folder / name for name in parts} | {"original": folder / "transformer"},
        contract=student_contract(teacher, 4),
        teacher_contract=teacher,
        facts=frozenset({Fact.TRAINED, Fact.PRUNED, Fact.FEW_STEP}),
        kept={"blocks.0": "blocks.0", "blocks.1": "blocks.2"},
    )


@pytest.fixture(scope="session")
def run(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the diffusers and the ONNX export."""
    folder = tmp_path_factory.mktemp("run")
    for exporter in (DiffusersExporter(), OnnxExporter()):
        made = folder / "exports" / exporter.name
        made.mkdir(parents=True)
        exporter.export(program, made, folder / "exports", silent)
    return folder


@pytest.fixture
def guided(program: Program) -> Program:
    """The same program sampled as its teacher: guided, by the ODE; three steps, to be quick."""
    teacher = program.teacher_contract
    contract = contract_of(dict(teacher.scheduler), num_inference_steps=3, guidance_scale=4.0, max_sequence_length=16)
    return replace(program, contract=contract)
