"""What the discriminator sees of stock transformers: the token grid of the latents, in its order, and no text."""

from __future__ import annotations

import pytest
import torch

from flcompress.models.families import find_family
from flcompress.models.inputs import SMALL_LATENTS
from flcompress.models.network import as_network
from flcompress.tracing.skip import graph_of, skip
from flcompress.training.distillation.discriminator import Heads, TeacherFeatures, head_parameters
from tests.tracing import models

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["wan", "hunyuan_video", "cogvideox", "mochi", "flux", "sd3"])
def test_a_latent_is_where_its_token_is(name: str) -> None:
    """With all blocks skipped a token knows its patch alone: a change there is seen there, in every feature."""
    model, _ = getattr(models, name)()
    family = find_family(type(model).__name__)
    assert family is not None
    graph, config = graph_of(model), model.config
    shape = family.fixed_latents(config) or SMALL_LATENTS
    shape = (1 if family.image else shape[0] + -shape[0] % family.patch(config)[0], *shape[1:])
    draw = torch.Generator().manual_seed(0)
    conditioning = family.example_conditioning(config, 1, shape, 8, draw)
    features = TeacherFeatures(model, as_network(model), graph)
    x = torch.randn(1, family.channels(config), *shape, generator=draw)
    changed = x.clone()
    at = (shape[0] - 1, 3, 6)
    changed[0, :, *at] += 1.0
    timestep = torch.tensor([500.0])
    with torch.no_grad(), skip(model, [block.path for block in graph.blocks], graph=graph):
        before, after = (features(clip, timestep, conditioning)[1] for clip in (x, changed))
    frames, side = family.patch(config)
    for one, other in zip(before, after, strict=True):
        assert one.shape[2:] == (shape[0] // frames, shape[1] // side, shape[2] // side)
        seen = (one != other).any(dim=1)[0].nonzero().tolist()
        assert seen == [[at[0] // frames, at[1] // side, at[2] // side]]
    assert [grid.shape[1] for grid in before] == features.channels


def test_every_token_has_a_logit_of_its_own() -> None:
    """Convolutions keep the grid, so that the border counts as what lies inside it does."""
    (head,) = Heads([8]).heads
    assert head(torch.zeros(2, 8, 3, 4, 5)).shape == (2, 1, 3, 4, 5)


def test_three_depths_with_a_gradient_to_the_sample_alone() -> None:
    """Half, three quarters and all of the way; a prediction is what it is without them."""
    model, given = models.wan(num_layers=8)
    model.requires_grad_(False)
    network = as_network(model)
    features = TeacherFeatures(model, network, graph_of(model))
    outputs: list[torch.Tensor] = []
    for path in ("blocks.4", "blocks.6", "blocks.7"):
        model.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output))
    x = given["hidden_states"].requires_grad_()
    conditioning = {"encoder_hidden_states": given["encoder_hidden_states"]}
    timestep = torch.tensor([500.0])
    prediction, grids = features(x, timestep, conditioning)
    assert not prediction.requires_grad
    torch.testing.assert_close(prediction, network(x, timestep, conditioning).detach(), rtol=0, atol=0)
    for grid, tokens in zip(grids, outputs[:3], strict=True):
        assert torch.equal(grid.flatten(2).transpose(1, 2), tokens)
    heads = Heads(features.channels)
    (logits,) = heads(grids)
    assert logits.shape == (1, 3)
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert float(gradient.abs().min()) > 0.0
    assert all(weight.grad is None for weight in heads.parameters())
    assert sum(weight.numel() for weight in heads.parameters()) == head_parameters(features.channels[0])
