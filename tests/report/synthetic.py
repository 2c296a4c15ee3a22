"""A run directory as `flcompress apply`, `eval` and `bench` leave it, with made-up numbers and no model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from flcompress.ir.block import Block, Flow, Stream, TensorSpec
from flcompress.ir.graph import BlockGraph
from flcompress.ir.serial import to_json

RECIPE = "version: 1\nmodel: teacher\npasses:\n  - importance: {draws: 256}\n  - prune: {remove: 0.3}\n"
TEACHER = {"num_inference_steps": 50, "guidance_scale": 4.0, "sigmas": [1 - n / 50 for n in range(50)]}
STUDENT = {"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": [1.0, 0.9, 0.75, 0.5]}
CONTENDERS = {
    "teacher-50": ("teacher, 50 steps, guided", 100, 420.0, 0.91),
    "teacher-4": ("teacher, 4 steps", 8, 980.0, 0.55),
    "raw-pruned": ("cut without training", 100, 1600.0, 0.30),
    "stochastic-depth-pruned": ("after stochastic depth, cut", 100, 640.0, 0.82),
    "student": ("student, 4 steps", 4, 431.0, 0.90),
}


def graph(count: int) -> BlockGraph:
    """A chain of `count` equal blocks."""
    spec = TensorSpec(shape=(1, 48, 64), dtype="float32")
    stream = Stream(input="hidden_states", output=0, spec=spec)
    blocks = [
        Block(
            path=f"blocks.{n}", stack="blocks", index=n, kind="WanTransformerBlock", streams=(stream,),
            parameters=100_000, flops=9_600_000, removable=True,
        )
        for n in range(count)
    ]  # fmt: skip
    nodes = ["input", *(block.path for block in blocks), "output"]
    flow = Flow(source="0", target="hidden_states", spec=spec)
    edges = {edge: [replace(flow, source="hidden_states" if edge[0] == "input" else "0")] for edge in
             zip(nodes, nodes[1:], strict=False)}  # fmt: skip
    return BlockGraph(
        model_class="WanTransformer3DModel", parameters=100_000 * count + 40_000, flops=10_000_000 * count,
        blocks=blocks, flows=edges, config_keys={"blocks": "num_layers"},
    )  # fmt: skip


def write_run(path: Path, *, blocks: int = 16, passes: bool = True, measured: bool = True) -> Path:
    """Write the run to `path`; without `passes` only the starting model, without `measured` no eval and no bench."""
    draw = random.Random(0)
    whole = graph(blocks)
    _json(
        path / "run.json",
        {"name": "moving-digits", "recipe_path": "recipes/moving-digits.yaml", "created": "2026-01-02T03:04:05Z"},
    )
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
            "weighting": "elbo", "draws": 256, "levels": bands, "u_index": 4.2, "seconds": 21.0, "forwards_equivalent": 8.7,
            "blocks": [
                {"path": p, "mean": m, "standard_error": 0.05 * m + 2e-4,
                 "per_level": [[a, b, m * (1 + b) * draw.uniform(0.8, 1.2), 0.08 * m] for a, b in bands]}
                for p, m in scores.items()
            ],
        }  # fmt: skip
        prune = {
            "removed": gone, "kept": kept, "parameters_before": whole.parameters, "parameters_after": cut.parameters,
            "share": cut.parameters / whole.parameters, "certificate": {"largest_difference": 0.0, "blocks_checked": len(gone)},
            "reasons": {p: "among the least important that hold 30 % of the parameters" for p in gone},
        }  # fmt: skip
        depth = {"prune_set": gone, "removed_share": 0.3, "by": "importance", "target": "frozen"}
        curve = [{"step": n, "stochastic_depth_loss": 0.1 * math.exp(-n / 90) * draw.uniform(0.6, 1.4) + 1e-3,
                  "stochastic_depth_grad_norm": draw.uniform(0.5, 1)} for n in range(1, 401)]  # fmt: skip
        monitor = [{"step": n, "elbo_full": 0.3 + 2e-5 * n, "elbo_pruned": 0.32 + 0.4 * math.exp(-n / 80), "elbo_original": 0.3}
                   for n in range(0, 401, 40)]  # fmt: skip
        dmd = [{"step": n, "generator_loss": draw.uniform(0.3, 0.7), "fake_score_loss": 0.4 + draw.uniform(-0.1, 0.1),
                "generator_grad_norm": draw.uniform(0.2, 3), "fake_score_grad_norm": draw.uniform(0.2, 1)} for n in range(1, 201)]  # fmt: skip
        entries += [
            ("importance", whole, TEACHER, importance, []),
            ("stochastic-depth", whole, TEACHER, depth, [*curve, *monitor]),
            ("prune", cut, TEACHER, prune, []),
            ("dmd", cut, STUDENT, {"sigmas": STUDENT["sigmas"], "timesteps": [1000, 900, 750, 500], "steps": 200, "seconds": 300.0}, dmd),
        ]  # fmt: skip
    journal: list[dict[str, Any]] = [{"time": 1767323045.0, "event": "start", "name": "moving-digits"}]
    for index, (name, model, contract, result, metrics) in enumerate(entries):
        key = f"{index:064x}"
        folder = path / "passes" / f"{index:02d}-{name}-{key[:12]}"
        arguments = {"draws": 256} if name == "importance" else {}
        _json(
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
        _json(folder / "program.json", {"contract": contract, "teacher_contract": TEACHER})
        (folder / "graph.json").write_text(to_json(model))
        if result is not None:
            _json(folder / "result.json", result)
        if metrics:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        if index:
            journal.append({"time": 1767323045.0 + 60 * index, "event": "pass", "name": name, "key": key, "seconds": 20.0 * index,
                            "status": "cached" if name == "importance" else "ran", "peak_rss_mb": 900.0})  # fmt: skip
    if passes:
        for name, octets in (("diffusers", 5_200_000), ("onnx", 4_900_000)):
            (path / "exports" / name).mkdir(parents=True)
            (path / "exports" / name / "weights.bin").write_bytes(bytes(octets))
            _json(path / "exports" / f"{name}.json", {"key": "k", "largest_difference": 2.4e-6, "tolerance": 1e-4})
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
    (path / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in journal))
    if measured:
        _measured(path, whole.parameters, cut.parameters)
    return path


def _measured(path: Path, before: int, after: int) -> None:
    contenders = [
        {
            "name": name, "label": label, "steps": 4, "guidance": 1.0, "evaluations": evaluations, "parameters": before,
            "frechet": _around(frechet, 15.0), "prompt_accuracy": _around(accuracy, 0.012),
            "digit_accuracy": _around(accuracy + 0.03, 0.01), "direction_accuracy": _around(accuracy + 0.02, 0.01),
            "motion_smoothness": _around(0.97, 0.002), "dynamic_degree": _around(0.46, 0.01),
            "imaging_quality": _around(0.7 - frechet / 9000, 0.005), "average": _around(accuracy * 0.8, 0.008),
            "strip": f"eval/strips/{name}.png",
        }
        for name, (label, evaluations, frechet, accuracy) in CONTENDERS.items()
    ]  # fmt: skip
    contenders[-1]["parameters"] = after
    _json(path / "eval" / "results.json", {
        "benchmark": "moving-digits", "clips": 1536, "seeds": 3, "prompts": 32, "floor": {"frechet": _around(90.0, 4.0)},
        "classifier": {"digit_accuracy": 0.981, "direction_accuracy": 0.994, "speed_accuracy": 0.99, "joint_accuracy": 0.966},
        "contenders": contenders,
    })  # fmt: skip
    (path / "eval" / "strips").mkdir(parents=True)
    for place, name in enumerate(CONTENDERS):
        strip = Image.new("RGB", (9 * 32, 2 * 32), (20, 20, 24))
        for frame in range(9):
            strip.paste(
                (230 - 30 * place, 200, 120 + 20 * place), (frame * 32 + 6 + frame, 8, frame * 32 + 16 + frame, 24)
            )
        strip.save(path / "eval" / "strips" / f"{name}.png")
    frames = [Image.new("P", (128, 64), n * 20) for n in range(4)]
    frames[0].save(path / "eval" / "comparison.gif", save_all=True, append_images=frames[1:], duration=120, loop=0)
    work = 100 * before / (4 * after)
    _json(path / "bench" / "results.json", {
        "machine": {"cpu": "Example CPU", "cores": 2, "gpu": None, "torch": "2.11.0"}, "rounds": 5, "batch": 1, "work_ratio": work,
        "rows": [
            {"backend": backend, "what": what, "teacher_seconds": _median(teacher), "student_seconds": _median(teacher / ratio),
             "ratio": _median(ratio)}
            for backend, what, teacher, ratio in (("torch eager", "denoising", 2.1, 33.0), ("torch eager", "pipeline", 2.3, 14.0),
                                                  ("ONNX Runtime", "denoising", 1.1, 34.0))
        ],
    })  # fmt: skip


def _around(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": [mean - half, mean, mean + half]}


def _median(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.97 * value, "high": 1.04 * value}


def _json(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
