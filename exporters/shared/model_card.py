"""The README.md of an exported pipeline: what it is, and how stock diffusers runs it."""

from __future__ import annotations

from importlib.metadata import version

from flcompress.core.program import Program
from flcompress.core.records import FactsFile
from flcompress.diffusion.contract import SamplingContract

CARD = """---
library_name: diffusers
pipeline_tag: {task}
---
# {blocks} blocks, {steps} steps

A {pipeline_class} compressed by flcompress: {parameters:,} parameters in its {transformer}, {evaluations} network
evaluations a sample (it was made from one sampled with {teacher_evaluations}).{experts}{rounding}

```python
import torch
from {library} import {pipeline_class}
{imports}
pipe = {pipeline_class}.from_pretrained("."{kept})
torch.manual_seed(0)
made = pipe(
    prompt="{prompt}",
{arguments}
)
{write}
```

Give all of these arguments: the pipeline's own defaults are for an uncompressed model. {seed}

The scheduler's noise levels are the ones the model was made for: sigmas {sigmas} (shift {shift:g}).{solver}
`{transformer}/kept_blocks.json` maps every block to its place in the original; `flcompress.json` holds the sampling
contract.
"""

STOCHASTIC = (
    "Each step noises its\nprediction again from torch's global generator, so `torch.manual_seed` decides the clip and "
    "`generator=` only its start."
)
DETERMINISTIC = "The seed decides the\nstarting noise, nothing else is random."

REPLACED = """
The scheduler is the model's own {scheduler}, which adds noise on the way; flcompress samples at its levels along the
ODE, so its clips are not those of a stock call."""


EXPERTS = """

Two experts share the timesteps: `transformer` answers from {boundary:g} on upward, `transformer_2` below. The
{compressed}-noise one was compressed here."""

SECOND_ALONE = (
    " Only `transformer_2` is guided; stock diffusers guides neither unless\n`guidance_scale` is more than 1, hence "
    "its odd value, which changes nothing."
)


ROUNDING = """

The weights of the {transformers} are stored in bf16, but for what diffusers keeps in fp32. Computed in bf16, the output
differs from that of the original weights in fp32 by {difference:.2g} at most, of values up to {magnitude:.2g}."""

QUANTIZED = """

Linear layers of the {transformers} are quantised by torchao {torchao}, which diffusers needs to load them: {kinds}.
{layers}
Whatever else they hold is in bf16, but for what diffusers keeps in fp32. The weights take {size:,} bytes. The output
differs from that of the original weights in fp32 by {difference:.2g} at most, of values up to {magnitude:.2g}."""

KINDS = {
    "fp8": "weights and\nactivations in fp8 (e4m3), with a scale for each output channel and each token, which\n"
    "GPUs multiply from sm89 on",
    "int8": "weights in\nint8, with a scale for each output channel; activations stay in bf16",
}


def model_card(program: Program, facts: FactsFile) -> str:
    """Return Markdown with the snippet that runs the exported folder.

    Args:
        program: what was exported.
        facts: how it is called, and what was changed of its weights.
    """
    contract, family = program.contract, program.family
    if family.image:
        task, imports, write = "text-to-image", "", 'made.images[0].save("picture.png")'
    else:
        task, write = "text-to-video", f'export_to_video(made.frames[0], "clip.mp4", fps={facts.frame_rate:g})'
        imports = "from diffusers.utils import export_to_video\n"
    lines = [f"    {name}={value!r}," for name, value in facts.call.items()]
    if program.pipeline_class in family.from_image:
        task, imports = "image-to-video", "from diffusers.utils import export_to_video, load_image\n"
        lines.insert(0, '    image=load_image("first_frame.png"),')
    return CARD.format(
        task=task,
        imports=imports,
        write=write,
        transformer=program.own_name,
        experts=_experts(contract),
        rounding=_rounding(program, facts),
        kept="" if facts.quantize is None else ", dtype=torch.bfloat16",
        blocks=len(program.graph.blocks),
        steps=contract.num_inference_steps,
        library=family.module_of(program.pipeline_class),
        pipeline_class=program.pipeline_class,
        parameters=program.graph.parameters,
        evaluations=contract.evaluations,
        teacher_evaluations=program.teacher_contract.evaluations,
        prompt="what the {} shows".format("picture" if family.image else "clip"),
        arguments="\n".join(lines),
        seed=STOCHASTIC if contract.stochastic else DETERMINISTIC,
        sigmas=", ".join(f"{sigma:.4g}" for sigma in contract.sigmas),
        shift=contract.shift,
        solver=REPLACED.format(scheduler=contract.scheduler_class) if contract.replaces_steps else "",
    )


def _rounding(program: Program, facts: FactsFile) -> str:
    if facts.precision is None:
        return ""
    transformers = " and ".join(program.transformers)
    if facts.quantize is None:
        return ROUNDING.format(transformers=transformers, difference=facts.difference, magnitude=facts.magnitude)
    layers = [
        f"- {what} in `{name}`: {', '.join(f'`{layer}`' for layer in names)}"
        for what, by_transformer in (("quantised", facts.quantized), ("not", facts.unquantized))
        for name, names in (by_transformer or {}).items()
    ]
    return QUANTIZED.format(
        transformers=transformers,
        torchao=version("torchao"),
        kinds=KINDS[facts.quantize],
        layers="\n" + "\n".join(layers) + "\n",
        size=facts.transformer_bytes,
        difference=facts.difference,
        magnitude=facts.magnitude,
    )


def _experts(contract: SamplingContract) -> str:
    if contract.experts is None:
        return ""
    text = EXPERTS.format(boundary=contract.experts.boundary, compressed=contract.experts.compressed)
    return text + (SECOND_ALONE if contract.guided and contract.guidance_scale == 1.0 else "")
