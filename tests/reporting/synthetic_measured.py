"""What `flcompress eval` and `bench` leave in a run directory, with made-up numbers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

CONTENDERS = {
    "teacher-50": ("teacher, 50 steps, guided", 100, 420.0, 0.91),
    "teacher-4": ("teacher, 4 steps", 8, 980.0, 0.55),
    "raw-pruned": ("cut without training", 100, 1600.0, 0.30),
    "stochastic-depth-pruned": ("after stochastic depth, cut", 100, 640.0, 0.82),
    "student": ("student, 4 steps", 4, 431.0, 0.90),
}


def write_measured(path: Path, program: str, before: int, after: int) -> None:
    """Write `eval/` and `bench/` of a run whose last key is `program`, cut from `before` to `after` parameters."""
    contenders = [
        {
            "name": name,
            "label": label,
            "steps": 4,
            "guidance": 1.0,
            "evaluations": evaluations,
            "parameters": before,
            "frechet": _around(frechet, 15.0),
            "prompt_accuracy": _around(accuracy, 0.012),
            "digit_accuracy": _around(accuracy + 0.03, 0.01),
            "direction_accuracy": _around(accuracy + 0.02, 0.01),
            "motion_smoothness": _around(0.97, 0.002),
            "dynamic_degree": _around(0.46, 0.01),
            "imaging_quality": _around(0.7 - frechet / 9000, 0.005),
            "average": _around(accuracy * 0.8, 0.008),
            "strip": f"eval/strips/{name}.png",
        }
        for name, (label, evaluations, frechet, accuracy) in CONTENDERS.items()
    ]
    contenders[-1]["parameters"] = after
    write_json(
        path / "eval" / "results.json",
        {
            "program": program,
            "benchmark": "moving-digits",
            "clips": 1536,
            "seeds": 3,
            "prompts": 32,
            "floor": {"frechet": _around(90.0, 4.0)},
            "classifier": {
                "digit_accuracy": 0.981,
                "direction_accuracy": 0.994,
                "speed_accuracy": 0.99,
                "joint_accuracy": 0.966,
            },
            "contenders": contenders,
            "paired": _paired(contenders),
        },
    )
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
    write_json(
        path / "bench" / "results.json",
        {
            "program": program,
            "machine": {"cpu": "Example CPU", "cores": 2, "gpu": None, "torch": "2.11.0"},
            "rounds": 5,
            "batch": 1,
            "family": "wan",
            "device": "cpu",
            "size": {"frames": 9, "height": 32, "width": 32},
            "precision": "fp32",
            "work_ratio": work,
            "rows": [
                {
                    "backend": backend,
                    "what": what,
                    "teacher_seconds": _median(teacher),
                    "student_seconds": _median(teacher / ratio),
                    "ratio": _median(ratio),
                    "teacher_memory": memory,
                    "student_memory": memory and memory // 2,
                }
                for backend, what, teacher, ratio, memory in (
                    ("torch eager", "denoising", 2.1, 33.0, 18_000_000),
                    ("torch eager", "pipeline", 2.3, 14.0, 24_000_000),
                    ("ONNX Runtime", "denoising", 1.1, 34.0, None),
                )
            ],
        },
    )


def _paired(contenders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences with four fifths of the means' intervals: where two of those overlap, this may tell them apart."""
    return [
        {"a": a["name"], "b": b["name"], "metric": metric, "mean": mean, "low": mean - half, "high": mean + half}
        for b, a in itertools.combinations(contenders, 2)
        for metric, value in a.items()
        if isinstance(value, dict)
        for mean in [a[metric]["mean"] - b[metric]["mean"]]
        for half in [0.4 * (value["high"] - value["low"])]
    ]


def _around(mean: float, half: float) -> dict[str, Any]:
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": [mean - half, mean, mean + half]}


def _median(value: float) -> dict[str, float]:
    return {"median": value, "low": 0.97 * value, "high": 1.04 * value}


def write_json(file: Path, value: object) -> None:
    """Write `file`, its folder too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))
