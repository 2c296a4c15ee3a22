"""A tiny pipeline of any family through encoding, every pass, generation, evaluation and timing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from flcompress import commands
from flcompress.data.encoding import encode, folder_request
from flcompress.driver.manager import apply
from flcompress.driver.rundir import RunDirectory
from flcompress.progress import QuietDisplay
from flcompress.runtime.generate import generate
from tests.families.pipelines import TINY, save
from tests.fixtures.video_files import write_video

PROMPT = "a three drifting up"
CLIPS = 5
RECIPE = """
version: 1
model: {{path: {model}}}
sampling:
  {{num_inference_steps: 2, guidance_scale: {guidance}, max_sequence_length: 16, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
data: {{latents: {data}}}
training: {{precision: bf16, health: {{on_breach: warn, samples: 1}}, log_to: []}}
passes:
  - importance: {{draws: 8, noise_levels: 1, batch: 8}}
  - stochastic-depth: {{remove: 0.1, steps: {steps}, batch: 2}}
  - prune: {{remove: 0.1}}
  - dmd: {{inter_cfg: [{guidance}, {guidance}], intra_cfg: [0.0, 0.5], student_steps: 2, steps: {steps},
      critic_updates: 1, batch: 2}}
  - consistency: {{levels: 2, guidance: {guidance}, student_steps: 2, steps: {steps}, batch: 2}}
exports: [diffusers]
"""
FIRST = """
  - importance: {draws: 8, noise_levels: 1, batch: 8}
  - stochastic-depth: {remove: 0.1, steps: 1, batch: 2}
  - prune: {remove: 0.1}
"""
DMD = "inter_cfg: [2, 2], student_steps: 2, steps: 1, critic_updates: 1, batch: 2"
OTHER_PASSES = {
    "adversarial-term": FIRST + f"  - dmd: {{{DMD}, gan_weight: 0.03}}",
    "both-roles-as-loras": FIRST
    + f"  - dmd: {{{DMD}, gan_weight: 0.03, fake_score: lora, generator: lora, lora_rank: 2, real_lean: 0.2}}",
    "one-base-for-all-roles": FIRST
    + f"  - dmd: {{{DMD}, real_score: elastic, fake_score: lora, generator: lora, lora_rank: 2}}",
    "recovery-by-features": """
  - temporal-attention: {draws: 8, noise_levels: 1}
  - prune: {remove: 0.1, by: temporal-attention}
  - feature-distill: {steps: 1, batch: 2}
""",
    "joint-selection": """
  - select: {remove: 0.1, draws: 16, candidates: 2, recover: 1, recover_batch: 2, batch: 2}
  - prune: {remove: 0.1, by: joint}
""",
    "pretraining": "  - pretrain: {steps: 1, batch: 2}",
}
"""What a recipe may do otherwise, for one family: passes by what they are for."""


@dataclass(frozen=True)
class WholeWay:
    """What is made for one family in `home`: its model, clips of its size with captions, and a recipe."""

    family: str
    home: Path
    steps: int = 1

    def prepare(self) -> None:
        """Write all that there is before the first command."""
        tiny, model = TINY[self.family], save(self.family, self.home / "model")
        frames, height, width = tiny.size
        for number in range(CLIPS):
            write_video(self.home / "videos" / f"{number}.mp4", frames=frames, height=height, width=width, seed=number)
        rows = [{"file": f"{number}.mp4", "caption": PROMPT} for number in range(CLIPS)]
        (self.home / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = RECIPE.format(
            model=model, data=self.home / "data", size=tiny.size, guidance=tiny.guidance, steps=self.steps
        )
        self.recipe.write_text(text)

    @property
    def recipe(self) -> Path:
        """The recipe of all stages."""
        return self.home / "recipe.yaml"

    def encode(self) -> None:
        """Encode the clips."""
        home = self.home
        request = folder_request(
            home / "model", home / "captions.jsonl", home / "data", home / "videos", max_sequence_length=16
        )
        encode(request, QuietDisplay())

    def apply(self) -> RunDirectory:
        """Carry out the recipe."""
        return apply(self.recipe, self.home / "run", display=QuietDisplay())

    def generate(self) -> Path:
        """Make a clip with the student, from a first frame if its pipeline starts from one."""
        index = json.loads((self.home / "model" / "model_index.json").read_text())
        picture = None
        if "ImageToVideo" in index["_class_name"]:
            picture = self.home / "first.png"
            Image.new("RGB", TINY[self.family].size[:0:-1], (90, 10, 200)).save(picture)
        return generate(self.home / "run", PROMPT, "torch", self.home / "out.gif", seed=0, image=picture)

    def others(self) -> dict[str, Callable[[], Any]]:
        """Return what may be done otherwise or afterwards; each by its name, in this order."""
        start, home = self.recipe.read_text().partition("passes:")[0], self.home
        calls: dict[str, Callable[[], Any]] = {}
        for name, passes in OTHER_PASSES.items():
            recipe = home / f"{name}.yaml"
            recipe.write_text(f"{start}passes:\n{passes}\nexports: [diffusers]\n")
            calls[name] = partial(apply, recipe, home / name, store=home / "run", display=QuietDisplay())
        local, student = home / "recovery-by-features", home / "run"
        calls["frame-local attention"] = partial(commands.generate, local, "a", out=home / "local.gif", frame_local=0.3)
        calls["evaluation by proxies"] = partial(commands.evaluate, student, suite="proxies", display=QuietDisplay())
        calls["timing"] = partial(commands.bench, student, rounds=1, display=QuietDisplay())
        return calls
