"""One clip on several processes against one process: losses, and weights after the steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from flcompress.core.settings import EngineName, OffloadName
from flcompress.core.steps import PassContext
from flcompress.distributed.launch import Launch, join
from flcompress.distributed.sequence import SequenceGroup
from flcompress.distributed.world import World
from flcompress.draws import Draws
from flcompress.errors import RequestError
from flcompress.models.families import family_of
from flcompress.models.inputs import example_inputs
from flcompress.models.network import as_network, half_precision, stock_model, stock_name
from flcompress.tracing.tracer import trace
from flcompress.training.engines import Hyper, engine_of, replicated
from flcompress.training.engines.sequence import split_tokens
from flcompress.training.role import Loss, TrainedRole
from tests.training.comparing import Difference, Smooth, apart, applied, difference, moved, rms, smooth
from tests.training.engines.test_engines import DEPTH, MATCHING
from tests.training.home import Home
from tests.training.processes import run

pytestmark = pytest.mark.slow

PASSES = (
    # One of the prune set, both, or none are skipped in a step; then always both.
    f"stochastic-depth: {{{DEPTH}, steps: 2, target: frozen, alpha: 0.7}}",
    f"stochastic-depth: {{{DEPTH}, steps: 1, target: self, skip_probability: 1.0}}",
    "prune: {remove: 0.3, by: middle}",
    f"dmd: {{{MATCHING}, steps: 2, intra_cfg: [0.2, 0.3], gan_weight: 0.5}}",  # its weight is 0 in the first step
    "consistency: {student_steps: 2, levels: 4, batch: 4, steps: 2, learning_rate: 0.1}",
)
UPDATES = 11
"""Three; two each of a critic, a discriminator, a generator, and of consistency."""


def test_two_processes_on_one_clip_equal_one(home: Home) -> None:
    settings = [f"training.{key}" for key in ("sequence_parallel=2", "micro_batch=3", "gradient_checkpointing=true")]
    one = applied(home, "sequence", PASSES, "local", 1)
    found = difference(home.model, one, applied(home, "sequence", PASSES, "ddp", 2, *settings))
    print(f"ddp: {found}")
    found.require(UPDATES)


HEADS, TEXT, BATCH = 3, 16, 2
SHAPE, TOKENS = (2, 4, 10), 20
"""2 frames of 2 x 5 patches: 7, 7 and 6 tokens for three processes."""
SMALL = {"num_attention_heads": HEADS, "in_channels": 4, "out_channels": 4}
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "wan": (
        "WanTransformer3DModel",
        {"attention_head_dim": 12, "text_dim": 8, "freq_dim": 32, "ffn_dim": 32, "num_layers": 3},
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "attention_head_dim": 16, "time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 3, "sample_width": 10,
            "sample_height": 4, "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True,
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "attention_head_dim": 10, "num_layers": 2, "num_single_layers": 1, "num_refiner_layers": 1,
            "text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
        },
    ),
}  # fmt: skip


class Training(NamedTuple):
    """A training on three processes: of a model, by an engine, with what waits in host memory."""

    model: str
    engine: EngineName
    offload: tuple[OffloadName, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file with its weights."""
        return f"{'-'.join((self.model, self.engine, *self.offload))}.safetensors"


TRAININGS = (
    Training("wan", "ddp"),
    Training("wan", "ddp", ("moments", "inputs")),
    Training("wan", "zero2"),
    Training("wan", "zero3"),
    Training("cogvideox", "zero1"),
    Training("hunyuan-video", "fsdp2"),
    Training("hunyuan-video", "fsdp2", ("moments", "inputs")),
)


def small(name: str) -> Any:
    """A model with random weights."""
    kind, settings = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, kind)(**SMALL, **settings)


@dataclass(frozen=True)
class Trainings:
    """Train every model, in place of the command that this process was started for; the main one writes the weights.

    Attributes:
        folder: holds the models.
    """

    folder: Path

    def __call__(self) -> None:
        Smooth()()
        launch = Launch.from_environment()
        with join("ddp", 600.0, "cpu", launch, sequence_parallel=launch.size) as world:
            for training in TRAININGS:
                result = train(self.folder / training.model, training.engine, world, training.offload)
                if world.main:
                    save_file(result, self.folder / training.file)
        raise SystemExit(0)


def train(
    folder: Path, name: EngineName, world: World, offload: tuple[OffloadName, ...] = ()
) -> dict[str, torch.Tensor]:
    """Train a model for two updates without its first block; return its weights, and "losses", in the main process."""
    needless: Any = None
    context = PassContext(
        directory=folder,
        seed=0,
        data=needless,
        progress=needless,
        world=world,
        engine=name,
        gradient_checkpointing=True,
        offload=offload,
    )
    engine = engine_of(context)
    role = TrainedRole(engine, "role", engine.load_trained(folder), batch=BATCH, hyper=Hyper(learning_rate=0.1))
    network, graph, lengths = as_network(role.module), engine.graph(folder), set[int]()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        lengths.add((*args, *kwargs.values())[0].shape[1])

    role.model.get_submodule(graph.blocks[-1].path).register_forward_pre_hook(note, with_kwargs=True)
    family = family_of(stock_name(stock_model(role.model)))
    config, draw = role.model.config, torch.Generator().manual_seed(0)
    conditioning = family.example_conditioning(config, BATCH, SHAPE, TEXT, draw)
    if "encoder_attention_mask" in conditioning:
        conditioning["encoder_attention_mask"][1, TEXT // 3 :] = 0.0  # every clip has a mask of its own
    if folder.name == "wan":  # noise levels token by token
        conditioning["first_frame"] = torch.randn(BATCH, 4, 1, *SHAPE[1:], generator=draw)

    def loss(draws: Draws) -> Loss:
        x, target = draws.normal(4, *SHAPE), draws.normal(4, *SHAPE)
        skipped = [graph.blocks[0].path]
        with engine.skip(role.model, skipped, graph=graph):
            prediction = network(x, 1000.0 * draws.uniform(), conditioning)
        backward = engine.skip(role.model, skipped, graph=graph)
        return Loss(value=(prediction - target).square().mean(), backward_context=backward)

    losses = [role.update(Draws(step, batch=BATCH), loss)["role_loss"] for step in range(2)]
    group = world.sequence
    assert lengths == {TOKENS if group is None else group.parts(TOKENS)[group.rank]}
    state = role.full_state()
    return {**state, "losses": torch.tensor(losses, dtype=torch.float64)} if world.main else {}


def test_three_processes_with_parts_of_unequal_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family and engine; text that is joined with the clip, masks of each clip, levels of each token; and the
    same bits with moments and inputs of blocks in host memory.
    """
    for name in MODELS:
        small(name).save_pretrained(tmp_path / name)
    run([], tmp_path / "output", processes=3, hooks=dict.fromkeys(range(3), Trainings(tmp_path)))
    monkeypatch.setattr(replicated, "optimiser", smooth)
    single = {name: train(tmp_path / name, "local", World()) for name in MODELS}
    for training in TRAININGS:
        name, engine, offload = training
        before, one = weights_in(tmp_path / name), single[name]
        found = load_file(tmp_path / training.file)
        assert found.keys() == one.keys()
        if offload:
            plain = load_file(tmp_path / Training(name, engine).file)
            assert all(torch.equal(value, plain[key]) for key, value in found.items())
        losses = apart(*([{"loss": value} for value in part.pop("losses").tolist()] for part in (dict(one), found)))
        way = moved(before, {key: value.double() for key, value in one.items() if key in before})
        off = max(rms(found[key].double() - one[key].double()) for key in found) / way
        result = Difference(losses, off)
        print(f"{name}, {engine}: {result}")
        result.require(2)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.double() for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_parts_of_a_sequence() -> None:
    assert SequenceGroup(0, 3).parts(20) == [7, 7, 6]
    with pytest.raises(
        RequestError,
        match=r"^training\.sequence_parallel: 3 given, but a clip has 2 tokens; expected at least one",
    ):
        SequenceGroup(0, 3).parts(2)


def test_half_precision_is_exchanged_as_attention_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a group of one process, which computes what a process alone does, to the last bit."""
    exchange, seen = SequenceGroup._exchange, set[torch.dtype]()

    def note(self: SequenceGroup, rows: torch.Tensor, *parts: Any) -> torch.Tensor:
        seen.add(rows.dtype)
        return exchange(self, rows, *parts)

    monkeypatch.setattr(SequenceGroup, "_exchange", note)
    model = small("hunyuan-video")
    inputs = example_inputs(model, latent_shape=SHAPE, tokens=TEXT)
    graph = trace(model, inputs)
    with join("ddp", 600.0, "cpu", Launch()), torch.no_grad(), half_precision("cpu", enabled=True):
        alone = model(**inputs, return_dict=False)[0]
        split_tokens(model, graph, SequenceGroup(0, 1))
        assert torch.equal(model(**inputs, return_dict=False)[0], alone)
    assert seen == {torch.bfloat16}
