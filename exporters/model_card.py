"""The README.md beside an exported pipeline: what it is, and how stock diffusers runs it."""

from __future__ import annotations

from collections.abc import Mapping

from flcompress.pipeline.program import Program

CARD = """---
library_name: diffusers
pipeline_tag: text-to-video
---
# {blocks} blocks, {steps} steps

A {pipeline_class} compressed by flcompress: {parameters:,} parameters in its transformer, {evaluations} network
evaluations a clip (it was made from one sampled with {teacher_evaluations}).

```python
import torch
from diffusers import {pipeline_class}
from diffusers.utils import export_to_video

pipe = {pipeline_class}.from_pretrained(".")
torch.manual_seed(0)
clip = pipe(
    "{prompt}",
{arguments}
).frames[0]
export_to_video(clip, "clip.mp4", fps=8)
```

Give all of these arguments: the pipeline's own defaults are for an uncompressed model. {seed}

The scheduler's noise levels are the ones the model was made for: sigmas {sigmas} (shift {shift:g}).
`transformer/kept_blocks.json` maps every block to its place in the original; `flcompress.json` holds the sampling
contract.
"""

STOCHASTIC = (
    "Each step noises its\nprediction again from torch's global generator, so `torch.manual_seed` decides the clip and "
    "`generator=` only its start."
)
DETERMINISTIC = "The seed decides the\nstarting noise, nothing else is random."


def model_card(program: Program, call: Mapping[str, int | float]) -> str:
    """Markdown with the snippet that runs the exported folder; `call` are the arguments beside the prompt."""
    contract = program.contract
    return CARD.format(
        blocks=len(program.graph.blocks),
        steps=contract.num_inference_steps,
        pipeline_class=program.pipeline_class,
        parameters=program.graph.parameters,
        evaluations=contract.evaluations,
        teacher_evaluations=program.teacher_contract.evaluations,
        prompt="a three drifting up and left, fast",
        arguments="\n".join(f"    {name}={value!r}," for name, value in call.items()),
        seed=STOCHASTIC if contract.stochastic else DETERMINISTIC,
        sigmas=", ".join(f"{sigma:.4g}" for sigma in contract.sigmas),
        shift=contract.shift,
    )
