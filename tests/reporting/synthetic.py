"""A run directory as `flcompress apply`, `eval` and `bench` leave it, with made-up numbers and no model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from flcompress.ir.block import Block, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import to_json
from tests.reporting.synthetic_measured import write_json, write_measured

RECIPE = "version: 1\nmodel: teacher\npasses:\n  - importance: {draws: 256}\n  - prune: {remove: 0.3}\n"


def contract(guidance: float, sigmas: list[float]) -> dict[str, Any]:
    """A sampling contract as `program.json` holds it."""
    return {
        "prediction": "flow",
        "scheduler_class": "FlowMatchEulerDiscreteScheduler",
        "scheduler": {"shift": 1.0},
        "num_inference_steps": len(sigmas),
        "sigmas": sigmas,
        "timesteps": [1000 * sigma for sigma in sigmas],
        "guidance_scale": guidance,
        "max_sequence_length": 16,
        "given_sigmas": None,
        "embedded_guidance": None,
        "experts": None,
        "guidance_convention": "u + w (c - u)",
    }


TEACHER = contract(4.0, [1 - n / 50 for n in range(50)])
STUDENT = contract(1.0, [1.0, 0.9, 0.75, 0.5])


def graph(count: int) -> BlockGraph:
    """A chain of `count` equal blocks."""
    spec = TensorSpec(shape=(1, 48, 64), dtype="float32")
    stream = Stream(input="hidden_states", output=0, spec=spec)
    blocks = [
        Block(
            path=f"blocks.{n}",
            stack="blocks",
            index=n,
            kind="WanTransformerBlock",
            streams=(stream,),
            parameters=100_000,
            flops=9_600_000,
            removable=True,
        )
        for n in range(count)
    ]
    nodes = ["input", *(block.path for block in blocks), "output"]
    flow = Flow(source="0", target="hidden_states", spec=spec)
    edges = {edge: [replace(flow, source="hidden_states" if edge[0] == "input" else "0")] for edge in pairwise(nodes)}
    return BlockGraph(
        model_class="WanTransformer3DModel",
        parameters=100_000 * count + 40_000,
        flops=10_000_000 * count,
        blocks=blocks,
        flows=edges,
        config_keys={"blocks": "num_layers"},
    )


def write_run(path: Path, *, blocks: int = 16, passes: bool = True, measured: bool = True) -> Path:
    """Write the run to `path`; without `passes` only the starting model, without `measured` no eval and no bench."""
    draw = random.Random(0)
    whole = graph(blocks)
    path.mkdir(parents=True, exist_ok=True)
    (path / "recipe.yaml").write_text(RECIPE)
    scores = {
        b.path: 0.02 * (0.12 + abs(2 * n / (blocks - 1) - 1) ** 3) * draw.uniform(0.8, 1.2)
        for n, b in enumerate(whole.blocks)
    }
    gone = sorted(sorted(scores, key=lambda p: scores[p])[: round(0.3 * blocks)], key=lambda p: int(p.split(".")[1]))
    cut = whole.without(gone)
    kept = {new: old for old, new in whole.renamed(gone).items()}
    entries: list[tuple[str, BlockGraph, dict[str, Any], dict[str, Any] | None, list[dict[str, float]]]] = [
        ("model", whole, TEACHER, None, [])
    ]
    if passes:
        bands = [(n / 4, (n + 1) / 4) for n in range(4)]
        importance = {
            "weighting": "elbo",
            "draws": 256,
            "levels": bands,
            "u_index": 4.2,
            "seconds": 21.0,
            "forwards_equivalent": 8.7,
            "blocks": [
                {
                    "path": p,
                    "mean": m,
                    "standard_error": 0.05 * m + 2e-4,
                    "per_level": [[a, b, m * (1 + b) * draw.uniform(0.8, 1.2), 0.08 * m] for a, b in bands],
                }
                for p, m in scores.items()
            ],
        }
        prune = {
            "removed": gone,
            "kept": kept,
            "parameters_before": whole.parameters,
            "parameters_after": cut.parameters,
            "share": cut.parameters / whole.parameters,
            "certificate": {"largest_difference": 0.0, "blocks_checked": len(gone)},
            "reasons": dict.fromkeys(gone, "among the least important that hold 30 % of the parameters"),
        }
        depth = {"prune_set": gone, "removed_share": 0.3, "by": "importance", "target": "frozen"}
        curve = [
            {
                "step": n,
                "stochastic_depth_loss": 0.1 * math.exp(-n / 90) * draw.uniform(0.6, 1.4) + 1e-3,
                "stochastic_depth_grad_norm": draw.uniform(0.5, 1),
            }
            for n in range(1, 401)
        ]
        monitor = [
            {
                "step": n,
                "elbo_full": 0.3 + 2e-5 * n,
                "elbo_pruned": 0.32 + 0.4 * math.exp(-n / 80),
                "elbo_original": 0.3,
            }
            for n in range(0, 401, 40)
        ]
        dmd = [
            {
                "step": n,
                "generator_loss": draw.uniform(0.3, 0.7),
                "fake_score_loss": 0.4 + draw.uniform(-0.1, 0.1),
                "generator_grad_norm": draw.uniform(0.2, 3),
                "fake_score_grad_norm": draw.uniform(0.2, 1),
            }
            for n in range(1, 201)
        ]
        entries += [
            ("importance", whole, TEACHER, importance, []),
            ("stochastic-depth", whole, TEACHER, depth, [*curve, *monitor]),
            ("prune", cut, TEACHER, prune, []),
            (
                "dmd",
                cut,
                STUDENT,
                {"sigmas": STUDENT["sigmas"], "timesteps": [1000, 900, 750, 500], "steps": 200, "seconds": 300.0},
                dmd,
            ),
        ]
    journal: list[dict[str, Any]] = [{"time": 1767323045.0, "event": "start", "name": "moving-digits"}]
    for index, (name, model, sampling, result, metrics) in enumerate(entries):
        key = f"{index:064x}"
        folder = path / "passes" / f"{index:02d}-{name}-{index:012x}"
        arguments = {"draws": 256} if name == "importance" else {}
        write_json(
            folder / "entry.json",
            {
                "key": key,
                "name": name,
                "index": index,
                "arguments": arguments,
                "seconds": 20.0 * index,
                "peak_rss_mb": 900.0,
            },
        )
        write_json(
            folder / "program.json",
            {
                "components": {"transformer": "transformer"},
                "contract": sampling,
                "teacher_contract": TEACHER,
                "facts": [],
                "prune_set": [],
                "kept": {},
                "index": {"_class_name": "WanPipeline"},
                "latents": [16, 3, 4, 4],
            },
        )
        (folder / "graph.json").write_text(to_json(model))
        if result is not None:
            write_json(folder / "result.json", result)
        if metrics:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        if index:
            journal.append(
                {
                    "time": 1767323045.0 + 60 * index,
                    "event": "pass",
                    "name": name,
                    "key": key,
                    "seconds": 20.0 * index,
                    "status": "cached" if name == "importance" else "ran",
                    "peak_rss_mb": 900.0,
                }
            )
    if passes:
        for name, octets in (("diffusers", 5_200_000), ("onnx", 4_900_000)):
            (path / "exports" / name).mkdir(parents=True)
            (path / "exports" / name / "weights.bin").write_bytes(bytes(octets))
            write_json(path / "exports" / f"{name}.json", {"key": "k", "largest_difference": 2.4e-6, "tolerance": 1e-4})
            journal.append(
                {
                    "time": 1767323500.0,
                    "event": "export",
                    "name": name,
                    "status": "ran",
                    "seconds": 6.5,
                    "peak_rss_mb": 1200.0,
                }
            )
        journal.append({"time": 1767323600.0, "event": "done", "name": "moving-digits"})
    write_json(
        path / "run.json",
        {
            "name": "moving-digits",
            "recipe_path": "recipes/moving-digits.yaml",
            "created": "2026-01-02T03:04:05+00:00",
            "entries": [f"passes/{index:02d}-{name}-{index:012x}" for index, (name, *_) in enumerate(entries)],
            "finished": True,
        },
    )
    (path / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in journal))
    if measured:
        write_measured(path, key, whole.parameters, cut.parameters)
    return path
