"""Whole updates of Stages II and III at real size, on tensors without storage; what they take is counted."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flcompress.core.program import Program
from flcompress.core.settings import Health
from flcompress.core.steps import Pass, PassContext
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.student import student_contract
from flcompress.draws import Draws
from flcompress.driver.start import Source, read_source
from flcompress.frontend.loading import load_recipe
from flcompress.frontend.recipe import Recipe
from flcompress.models.families import family_of
from flcompress.models.loading import meta_transformer, transformer_class
from flcompress.models.network import CudaAutocast
from flcompress.models.tensor_memory import Alive
from flcompress.passes.dmd import DistributionMatching
from flcompress.passes.stochastic_depth import StochasticDepth
from flcompress.planning.activations import saved_activations
from flcompress.planning.exchanges import TransformerShapes
from flcompress.planning.machines import gpu_machine
from flcompress.planning.settings import PlannedInput, Planner, Setting
from flcompress.tracing.running import AllTrueMasks
from flcompress.training.distillation.roles import Roles
from flcompress.training.engines.replicated import Local
from flcompress.training.methods.stochastic_depth import DepthRoles
from flcompress.training.role import TrainedRole

P = TypeVar("P", bound=Pass)
RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALONE = [
    "training.engine=local",
    "training.processes=1",
    "training.sequence_parallel=1",
    "passes.stochastic-depth.batch=1",
    "passes.dmd.batch=1",
    "passes.dmd.critic_updates=1",
]


class Values(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answer what the host asks a tensor without storage: numbers are one, what is true or false is false."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 1.0)
        return func(*args, **(kwargs or {}))


class Weightless(Local):
    """The engine of one process, whose models are read from configurations and have no storage."""

    def _load(self, folder: Path, dtype: torch.dtype | None, *, trained: bool, unsharded: Collection[str] = ()) -> Any:
        model = meta_transformer(folder)
        single = set(model._keep_in_fp32_modules or ())
        for name, buffer in list(model.named_buffers()):
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner).register_buffer(key, torch.empty(buffer.shape, dtype=buffer.dtype))
        for name, parameter in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            kind = torch.float32 if single & set(name.split(".")) else dtype
            weight = torch.nn.Parameter(torch.empty(parameter.shape, dtype=kind), requires_grad=trained)
            model.get_submodule(owner).register_parameter(key, weight)
        return model

    def checkpoint_blocks(self, model: Any, function: Callable[..., Any] | None = None) -> None:
        # A mode is off inside of what it handles, such as a backward, and with it what that recomputes.
        recomputed = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), CudaAutocast()))
        super().checkpoint_blocks(model, function or recomputed)


@dataclass(frozen=True)
class Clips:
    """A dataset of clips of one size, which are noise."""

    latents: tuple[int, int, int, int]
    negative: dict[str, Tensor]
    prompts_only: bool = False

    def __len__(self) -> int:
        return 64

    def batch(self, n: int, generator: torch.Generator, mine: slice) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.randn(n, *self.latents), self.negative

    def conditions(self, n: int, generator: torch.Generator, latents: Any, mine: slice) -> Any:
        return (n, *latents), self.negative

    def split(self, count: int) -> tuple[Clips, Clips]:
        return self, self


@dataclass(frozen=True)
class RealSize:
    """A shipped recipe at its own size on one GPU, of whose transformer some blocks are there.

    Attributes:
        recipe: the recipe, one clip a step.
        source: its model.
    """

    recipe: Recipe
    source: Source

    @classmethod
    def of(cls, name: str, home: Path, depth: Mapping[str, int] | None = None, *more: str) -> RealSize:
        """Read `recipes/NAME.yaml`; `home` takes the configurations."""
        folder = Path(shutil.copytree(RECIPES / "configs" / name, home / "model"))
        config = json.loads((folder / "transformer" / "config.json").read_text()) | (depth or {})
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        recipe = load_recipe(RECIPES / f"{name}.yaml", [f"model.path={folder}", *ALONE, *more])
        return cls(recipe, read_source(recipe))

    def step(self, kind: type[P]) -> P:
        """Return the recipe's pass of a class."""
        return next(step for step in self.recipe.passes if isinstance(step, kind))

    def planned(self, kind: type[Pass], removed: Sequence[str] = ()) -> float:
        """Return the planned bytes of a pass on a GPU, of a transformer without some blocks."""
        machine, training = gpu_machine(self.recipe, "h100", 1), self.recipe.training
        graph, tokens = self.source.graph, self.source.contract.max_sequence_length
        shape = self.source.latents[1:]
        saved = saved_activations(self.source.transformer, graph, tokens, shape, training.precision, gpu=True)
        left = graph.parameters - sum(graph.block(path).parameters for path in removed)
        planned = PlannedInput(self.step(kind), float(left), len(graph.blocks) - len(removed), (), 0, training.health)
        shapes = TransformerShapes.of(meta_transformer(self.source.transformer), graph)
        planner = Planner(graph, {training.precision: saved}, shapes)
        return planner.plan(planned, Setting.of(training), machine).memory.total

    def counted(self, kind: type[Pass], removed: Sequence[str] = ()) -> int:
        """Return the most bytes that are alive in a whole update of every role of a pass, by CUDA's autocast."""
        program, student, prompt = self._program(removed), self._student(), self._prompt()
        # Made here: they are kept, and their tensors need storage.
        processes = program.contract.process, student.process
        values = Values()  # type: ignore[no-untyped-call]
        with FakeTensorMode(allow_non_fake_inputs=True), AllTrueMasks(), CudaAutocast(), Alive() as alive, values:
            given = {name: torch.empty(value.shape, dtype=value.dtype) for name, value in prompt.items()}
            engine = Weightless(self._context(program, "cpu", given))
            roles, trained = self._roles(kind, program, student, engine)
            for role in trained:
                role._wrapped.begin_moments()
            with engine.forward_mode():
                roles.step(1, Draws(0, "memory", 1, batch=1))
        del roles, trained, engine, processes
        gc.collect()  # tensors of the mode that only cycles hold
        most: int = alive.most
        return most

    def measured(self, kind: type[Pass], removed: Sequence[str] = ()) -> int:
        """Return the most bytes that a GPU's tensors take in an update of every role of a pass, with random weights."""
        for folder in {self.source.transformer, self._without(removed)}:
            stock = transformer_class(folder)
            stock.from_config(stock.load_config(folder)).save_pretrained(folder)
        program = self._program(removed)
        engine = Local(self._context(program, "cuda", self._prompt()))
        roles, _ = self._roles(kind, program, self._student(), engine)
        with engine.forward_mode():
            roles.step(1, Draws(0, "memory", 1, batch=1))  # the first moments, and the libraries' workspaces
            torch.cuda.reset_peak_memory_stats()
            roles.step(2, Draws(0, "memory", 2, batch=1))
        return torch.cuda.max_memory_allocated()

    def _student(self) -> SamplingContract:
        family = family_of(self.source.index["_class_name"])
        return student_contract(self.source.contract, self.step(DistributionMatching).student_steps, family.sigmas)

    def _program(self, removed: Sequence[str]) -> Program:
        source, pruned = self.source, self._without(removed)
        return Program(
            graph=source.graph,
            index=source.index,
            latents=source.latents,
            components={"original": source.transformer, "elastic": source.transformer, "transformer": pruned},
            contract=source.contract,
            teacher_contract=source.contract,
            prune_set=tuple(removed),
        )

    def _prompt(self) -> dict[str, Tensor]:
        source, draw = self.source, torch.Generator().manual_seed(0)
        config, tokens = meta_transformer(source.transformer).config, source.contract.max_sequence_length
        family = family_of(source.index["_class_name"])
        return family.example_conditioning(config, 1, source.latents[1:], tokens, draw)

    def _context(self, program: Program, device: str, prompt: dict[str, Tensor]) -> PassContext:
        source, training = self.source, self.recipe.training
        return PassContext(
            directory=program.components["transformer"],
            seed=0,
            data=lambda _: Clips(source.latents, prompt),  # type: ignore[arg-type,return-value]
            progress=lambda *_: None,
            device=device,
            precision=training.precision,
            gradient_checkpointing=training.gradient_checkpointing,
            health=Health(samples=0),
        )

    def _roles(
        self, kind: type[Pass], program: Program, student: SamplingContract, engine: Local
    ) -> tuple[Roles | DepthRoles, Sequence[TrainedRole]]:
        if kind is DistributionMatching:
            roles = Roles(self.step(DistributionMatching).settings, program, student, engine)
            return roles, roles.trained
        depth = DepthRoles(self.step(StochasticDepth).training, program, engine)
        return depth, (depth.role,)

    def _without(self, removed: Sequence[str]) -> Path:
        """Return the folder of the transformer's configuration without some blocks."""
        graph, whole = self.source.graph, self.source.transformer
        if not removed:
            return whole
        config = json.loads((whole / "config.json").read_text())
        for path in removed:
            config[graph.config_keys[graph.block(path).stack]] -= 1
        folder = whole.parent / f"without {len(removed)}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder
