"""A model of real size from clips to a student on one GPU, each pass next to its plan.

`python -m docs.measurements.gpu_whole OUT` makes the pipeline of Wan 2.1 1.3B from the shipped configuration with
random weights (but for the text encoder, which is small and of its width) and five clips of 81 frames at 480p, and
gives the commands that a user gives: encode, apply with a few steps of each stage, report, generate and, at a size of
its own, bench. Seconds of each command, what they print and the report's table of plan and measurement go to standard
output. Ten minutes of an H200 are not too many; on a machine without a GPU give a small `--size` and `--layers`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from flcompress.models.configs import read_json
from flcompress.models.loading import transformer_class
from flcompress.runtime.torch_session import best_device
from tests.families.encoders import tokenizer, umt5
from tests.fixtures.video_files import write_video

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"
CLIPS, TOKENS = 5, 512
PROMPT = "a three drifting up"
# Stage III makes no held-out samples: those of the teacher, which come first, would take longer than the steps.
RECIPE = """
version: 1
model: {{path: {model}}}
sampling: {{num_inference_steps: 50, guidance_scale: 5.0, max_sequence_length: {tokens}, num_frames: {frames},
  height: {height}, width: {width}}}
data: {{latents: {data}}}
training: {{precision: bf16, gradient_checkpointing: true, health: {{on_breach: warn, samples: 0}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 1, batch: 1}}
  - stochastic-depth: {{remove: 0.3, steps: {steps}, batch: 1, learning_rate: 1e-5}}
  - prune: {{remove: 0.3}}
  - dmd: {{student_steps: 4, inter_cfg: [3.0, 4.0], intra_cfg: [0.0, 0.5], critic_updates: 1, steps: {steps}, batch: 1,
      learning_rate: 5e-7, critic_learning_rate: 5e-7}}
exports: [diffusers]
"""


def make_pipeline(name: str, folder: Path, layers: int | None) -> None:
    """Write a stock WanPipeline of a shipped configuration with random weights."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    source = CONFIGS / name
    settings = read_json(source / "transformer" / "config.json", "")
    settings |= {} if layers is None else {"num_layers": layers}
    torch.manual_seed(0)
    with torch.device(best_device()):
        transformer = transformer_class(source / "transformer").from_config(settings)
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(source / "vae"))
    single = set(transformer._keep_in_fp32_modules or ())
    for path, parameter in transformer.named_parameters():
        if not single & set(path.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    scheduler = UniPCMultistepScheduler.from_pretrained(source / "scheduler")
    WanPipeline(tokenizer(), umt5(settings["text_dim"]), vae, scheduler, transformer).save_pretrained(folder)


def command(name: str, *arguments: str | Path) -> None:
    """Give a command; print how it ended and its seconds."""
    words = [sys.executable, "-m", "flcompress", name, *map(str, arguments)]
    started = time.monotonic()
    status = subprocess.run(words, check=False).returncode
    print(f"== flcompress {name}: exit {status}, {time.monotonic() - started:.1f} s", flush=True)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--config", default="wan2.1-t2v-1.3b", show_default=True, help="Folder of recipes/configs, of a Wan.")
@click.option("--layers", type=int, help="Blocks; all by default.")
@click.option("--size", default="81x480x832", show_default=True, help="FRAMESxHEIGHTxWIDTH.")
@click.option("--bench-size", help="FRAMESxHEIGHTxWIDTH that bench times.  [default: none]")
@click.option("--steps", default=10, show_default=True, help="Of each training.")
def main(out: Path, config: str, layers: int | None, size: str, bench_size: str | None, steps: int) -> None:
    """Take a model of real size through every command."""
    frames, height, width = map(int, size.split("x"))
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    make_pipeline(config, out / "model", layers)
    for number in range(CLIPS):
        path = out / "videos" / f"{number}.mp4"
        write_video(path, frames=frames, height=height, width=width, seed=number, rate=16)
    rows = [{"file": f"{number}.mp4", "caption": PROMPT} for number in range(CLIPS)]
    (out / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given: dict[str, Any] = {"model": out / "model", "data": out / "data", "tokens": TOKENS, "steps": steps}
    (out / "recipe.yaml").write_text(RECIPE.format(frames=frames, height=height, width=width, **given))
    print(f"== made in {time.monotonic() - started:.1f} s", flush=True)

    folders = "--pipeline", out / "model", "--videos", out / "videos", "--captions", out / "captions.jsonl"
    run = out / "run"
    command("encode", *folders, "--out", out / "data")
    command("apply", out / "recipe.yaml", "--run-dir", run)
    command("report", run)
    command("generate", run, "--prompt", PROMPT, "--out", out / "clip.mp4")
    if bench_size is not None:
        command("bench", run, "--size", bench_size, "--rounds", "2", "--backend", "compile")


if __name__ == "__main__":
    main()
