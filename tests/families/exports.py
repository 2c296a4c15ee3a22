"""A tiny pipeline of any family as the program that its exporters are handed, and what its export is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flcompress.core.program import Program
from flcompress.core.records import ContractPart, FactsFile
from flcompress.diffusion.contract import SamplingContract
from flcompress.driver.start import read_source, starting_program
from flcompress.frontend.loading import load_recipe
from flcompress.models.parts import open_parts
from tests.families.pipelines import EXPORTED, save

PROMPT = "a three drifting up"
RECIPE = """
version: 1
model: {{path: {model}}}
sampling:
  {{num_inference_steps: 4, guidance_scale: {guidance}, max_sequence_length: {tokens}, num_frames: {size[0]},
   height: {size[1]}, width: {size[2]}}}
passes: []
"""


def exportable(name: str, folder: Path) -> Program:
    """Write the pipeline below `folder` and start a program with it."""
    tiny, path = EXPORTED[name], folder / "recipe.yaml"
    tokens = 512 if name == "wan-i2v" else 16  # the stock transformer with an image encoder takes no other length
    model = save(name, folder / "model")
    path.write_text(RECIPE.format(model=model, guidance=tiny.guidance, tokens=tokens, size=tiny.size))
    recipe = load_recipe(path)
    return starting_program(recipe, read_source(recipe), folder)


def first_frame(folder: Path, facts: FactsFile) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(the stock call's image, our conditioning by it); nothing for text to video."""
    from PIL import Image

    parts = open_parts(folder)
    if not parts.from_image:
        return {}, {}
    pixels = (torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
    clip = (pixels.permute(2, 0, 1).float() / 127.5 - 1.0)[None, :, None].expand(1, 3, 9, 32, 32)
    return {"image": Image.fromarray(pixels.numpy())}, parts.encode_images(clip, [PROMPT], 16)


def other_boundary(facts: FactsFile, step: int) -> FactsFile:
    """The same facts with a boundary just below the noise level of a step, so that the high-noise expert takes it."""
    contract = SamplingContract.from_dict(facts.contract.dump())
    assert contract.experts is not None
    moved = replace(contract, experts=replace(contract.experts, boundary_ratio=contract.sigmas[step] - 1e-3))
    return facts.model_copy(update={"contract": ContractPart(**moved.to_dict())})
