"""Stage III: distribution matching distillation with a well-guided teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from flcompress.data.latents import LatentDataset
from flcompress.diffusion import matching
from flcompress.diffusion.conditioning import Conditioning, on, without_prompt
from flcompress.diffusion.contract import SamplingContract
from flcompress.diffusion.guidance import well_guided
from flcompress.diffusion.sampling import advance, predict
from flcompress.diffusion.student import student_contract
from flcompress.draws import Draws, seed_of
from flcompress.errors import RequestError
from flcompress.models.loading import load_transformer, meta_transformer, save_transformer
from flcompress.models.network import as_network
from flcompress.pipeline.health import Range
from flcompress.pipeline.passes import Cost, EngineName, Pass, Role, Work
from flcompress.pipeline.program import Fact, Program
from flcompress.pipeline.recipe import Training
from flcompress.trace.prefix import remember
from flcompress.trace.skip import graph_of
from flcompress.training.discriminator import Discriminator, critic_term, generator_term
from flcompress.training.engines import Engine, Hyper, engine_of
from flcompress.training.loop import train
from flcompress.training.lora import LoRA, SharedBase, lora_parameters, merge, unlike
from flcompress.training.objectives import denoising_loss, draw_levels, level_range
from flcompress.training.student_health import StudentHealth, student_watch
from flcompress.training.trained import Trained

BETAS = (0.0, 0.999)
"""AdamW's, for both roles: no momentum, since what each follows moves (Yin et al. 2024, DMD2)."""


class DistributionMatching(Pass):
    """Turn the transformer into a few-step generator that needs no guidance (DMD2 with FastLightGen's teacher).

    Four roles. The generator is the present, usually pruned, transformer. The fake score follows the generator's
    distribution by flow matching, several updates to each of the generator's. The real score is frozen and guides:

        x_real = u_full + b1 (c_full - u_full) + b2 (c_full - c_pruned)

    with b1 and b2 drawn from ranges for every sample. A discriminator on the fake score's features is optional.

    The fake score, and the generator too, can be LoRAs on the one frozen copy of the real score's weights, see
    docs/training-memory.md. A LoRA generator computes with the prune set skipped; the finished one is merged into the
    pruned transformer's own weights.

    `- dmd: {student_steps: 4, inter_cfg: [3, 4], steps: 200}`
    """

    name: ClassVar[str] = "dmd"
    version: ClassVar[int] = 3
    needs_data: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.FEW_STEP})
    voids: ClassVar[frozenset[Fact]] = frozenset({Fact.ELASTIC})

    student_steps: int = Field(4, ge=1, le=16, description="network calls of the finished generator")
    inter_cfg: Range = Field((3.0, 4.0), description="b1, text guidance, range; 1 is none (u + w (c - u))")
    intra_cfg: Range = Field(
        (0.0, 0.0),
        description="b2, guidance of the full teacher away from its pruned self, range; 0 is none "
        "(the paper's best is 0.25; on the embedded benchmark none is better, docs/benchmarks.md)",
    )
    real_score: Literal["original", "elastic"] = Field(
        "original", description="whose weights: the model the recipe started from, or what stochastic depth made of it"
    )
    fake_score: Literal["full", "lora"] = Field(
        "full", description="a whole model, or a LoRA on the real score's weights, which it then starts from"
    )
    generator: Literal["full", "lora"] = Field(
        "full", description="a whole model, or a LoRA on the real score's weights, which then must be elastic"
    )
    lora_rank: int = Field(32, ge=1, description="rank of LoRAs, on every linear layer of the blocks")
    critic_updates: int = Field(5, ge=1, description="updates of the fake score for each of the generator's")
    steps: int = Field(gt=0, description="updates of the generator")
    batch: int = Field(16, gt=0, description="clips an update")
    learning_rate: float = Field(2e-4, gt=0, description="of the generator")
    critic_learning_rate: float = Field(2e-4, gt=0, description="of the fake score")
    score_range: Range = Field(
        (0.02, 0.98), description="noise levels at which the scores are compared, before the shift"
    )
    ema_decay: float = Field(0.98, ge=0, lt=1, description="decay of the generator's moving average, which is kept")
    gan_weight: float = Field(0.0, ge=0, description="weight of the adversarial term; 0 is none")

    @model_validator(mode="after")
    def _lora_has_its_base(self) -> DistributionMatching:
        if self.generator == "lora" and self.real_score != "elastic":
            raise ValueError(
                "generator: lora given with real_score: original, expected elastic: a LoRA starts from the weights it "
                "shares, and the generator from those of stochastic depth; set real_score: elastic or generator: full"
            )
        if self.gan_weight and self.fake_score == "lora":
            raise ValueError(
                f"gan_weight: {self.gan_weight:g} given with fake_score: lora, expected 0: the term reads inside a "
                "fake score of its own; set fake_score: full or gan_weight: 0"
            )
        return self

    @property
    def _shares(self) -> bool:
        return "lora" in (self.fake_score, self.generator)

    def evaluations(self, evaluations: int) -> int:
        return self.student_steps

    @property
    def needs(self) -> frozenset[Fact]:
        needed = {Fact.TRAINED}
        if self.intra_cfg != (0.0, 0.0):
            needed.add(Fact.PRUNED)
        return frozenset(needed)

    @property
    def needs_clips(self) -> bool:
        return self.gan_weight > 0

    @property
    def engines(self) -> tuple[EngineName, ...]:
        # The adversarial term reads the fake score from outside its engine; ZeRO-3 splits no weights that roles share.
        if self.gan_weight:
            return ("local", "ddp")
        return tuple(one for one in super().engines if one != "zero3" or not self._shares)

    def cost(self, parameters: float, blocks: int, original: float) -> Cost:
        # The generator is pruned; the scores are as deep as the original. A LoRA's backward has no weights' gradients.
        pruned = parameters / original
        of_generator, of_fake = (2.0 if kind == "lora" else 3.0 for kind in (self.generator, self.fake_score))
        simulate = pruned * (self.student_steps - 1) / 2.0
        intra = pruned if self.intra_cfg != (0.0, 0.0) else 0.0
        generator = simulate + pruned * of_generator + 1.0 + 2.0 + intra
        critic = simulate + pruned + of_fake

        def role(name: str, kind: str, parameters: float, blocks: float, *, averaged: bool = False) -> Role:
            own = lora_parameters(parameters, blocks, self.lora_rank) if kind == "lora" else parameters
            return Role(name, own, trained=True, averaged=averaged, runs=parameters)

        return Cost(
            steps=self.steps,
            forwards=self.steps * self.batch * (generator + self.critic_updates * critic),
            again=self.steps * self.batch * (pruned + self.critic_updates),
            batch=self.batch,
            roles=(
                role("generator", self.generator, parameters, blocks, averaged=True),
                role("fake score", self.fake_score, original, blocks / pruned),
                Role("shared base" if self._shares else "real score", original),
            ),
        )

    def check(self, training: Training) -> None:
        if self.gan_weight and training.engine not in ("local", "ddp"):
            raise RequestError(
                f"dmd.gan_weight: {self.gan_weight:g} given with training.engine {training.engine}, expected 0: the "
                "term reads the fake score from outside its engine; use local or ddp"
            )
        if self._shares and training.engine == "zero3":
            raise RequestError(
                "training.engine: zero3 given with LoRA roles in dmd, expected local, ddp, zero1, zero2 or fsdp2: "
                "DeepSpeed does not split weights that roles share; use fsdp2"
            )
        if self._shares and training.compile:
            raise RequestError(
                "training.compile: true given with LoRA roles in dmd, expected false: every role's every layer would "
                "be compiled by itself; set it to false, or fake_score and generator to full"
            )

    def apply(self, program: Program, work: Work) -> Program:
        if self.generator == "lora":
            parts = program.components
            odd = work.world.once(lambda: unlike(parts["transformer"], parts["elastic"], program.kept))
            if odd:
                raise RequestError(
                    f"dmd.generator: lora given, but {odd} of the transformer is not that of the elastic one, whose "
                    "weights a LoRA would start from; set generator: full"
                )
        contract = student_contract(program.teacher_contract, self.student_steps, program.family.sigmas)
        started = time.monotonic()
        matcher = _Matcher(self, program, contract, engine_of(work))
        steps = train(
            matcher.step,
            matcher.roles,
            engine=matcher.engine,
            name=self.name,
            steps=self.steps,
            batch=self.batch,
            watch=student_watch(work, self.name, matcher.health),
        )
        weights = matcher.generator.averaged_state()
        target = work.directory / "transformer"
        if work.world.main:
            if self.generator == "lora":
                whole = load_transformer(program.components["transformer"]).state_dict()
                weights = merge(whole, weights, program.kept)
            save_transformer(program.components["transformer"], weights, target)
            result = {
                "sigmas": list(contract.sigmas),
                "timesteps": list(contract.timesteps),
                "steps": steps,
                "seconds": time.monotonic() - started,
            }
            (work.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return replace(program.with_component("transformer", target), contract=contract)


class _Matcher:
    """The four roles of one distillation and the step that updates them."""

    def __init__(
        self, settings: DistributionMatching, program: Program, contract: SamplingContract, engine: Engine
    ) -> None:
        self.engine = engine
        work, parts = engine.work, program.components
        self._settings, self._contract, self._device = settings, contract, work.device
        self._data, fixed = self._split(work.data(program), work.health.samples)
        self._latents, self._start = program.latents, program.family.start
        self._negative = on(self._data.negative, self._device)
        self._shift, self._process = program.teacher_contract.shift, contract.process
        guidance = contract.embedded_guidance
        self._prune_set = program.prune_set
        self._real_model = work.frozen(parts[settings.real_score])
        self._real_graph = graph_of(meta_transformer(parts[settings.real_score]))
        depth = [block.path for block in self._real_graph.blocks]
        base = SharedBase(self._real_model, depth if settings._shares else ())
        if settings._shares:
            work.checkpoint_blocks(self._real_model, base.checkpoint)
        self._real = as_network(engine.frozen(self._real_model), guidance)

        def model(name: str, kind: str, component: str, kept: Collection[str]) -> Any:
            if kind == "full":
                return work.trained(parts[component])
            gone = [path for path in depth if path not in kept]
            return LoRA(
                base,
                kept,
                settings.lora_rank,
                seed=seed_of(work.seed, name),
                around=lambda: engine.skip(self._real_model, gone, graph=self._real_graph),
            )

        self.generator = Trained(
            engine,
            "generator",
            model("generator", settings.generator, "transformer", program.kept.values()),
            batch=settings.batch,
            hyper=Hyper(learning_rate=settings.learning_rate, betas=BETAS),
            ema_decay=settings.ema_decay,
        )
        self._generator = as_network(self.generator.module, guidance)
        fake = model("fake score", settings.fake_score, "elastic", depth)
        self._fake = as_network(fake, guidance)
        critic = fake
        if settings.gan_weight:
            middle = program.graph.blocks[len(program.graph.blocks) // 2]
            width = middle.streams[0].spec.shape[-1]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                critic = Discriminator(fake, self._fake, middle.path, width).to(self._device)
        self._critic = Trained(
            engine,
            "fake_score",
            critic,
            batch=settings.batch,
            hyper=Hyper(learning_rate=settings.critic_learning_rate, betas=BETAS),
        )
        if not settings.gan_weight:
            self._fake = as_network(self._critic.module, guidance)
        student, teacher, self._partner = self._generator, self._real, None
        # A low-noise expert starts where its partner ends; what comes after a high-noise one concerns samples alone.
        if (experts := contract.experts) is not None and (experts.compressed == "low" or fixed is not None):
            self._partner = as_network(engine.frozen(work.frozen(parts["partner"])), guidance)
            student, beside = experts.joined(student, self._partner), self._partner
            if fixed is not None and parts["original_partner"] != parts["partner"]:
                beside = as_network(engine.frozen(work.frozen(parts["original_partner"])), guidance)
            teacher = experts.joined(teacher, beside)
        low, high = settings.score_range
        self._score_range = level_range(contract, self._shift, low=low, high=high, key="dmd.score_range")
        self.roles = (self.generator, self._critic)
        self.health: StudentHealth | None = None
        if fixed is not None:
            self.health = StudentHealth(
                work,
                program,
                contract,
                fixed,
                batch=settings.batch,
                generator=self.generator,
                student=student,
                fake=self._fake,
                real=teacher,
                score_range=self._score_range,
            )

    @staticmethod
    def _split(data: LatentDataset, samples: int) -> tuple[LatentDataset, LatentDataset | None]:
        """(what is trained on, what the fixed samples are made from); prompts alone serve both."""
        if not samples:
            return data, None
        return (data, data) if data.prompts_only else data.split(min(samples, max(1, len(data) // 4)))

    def step(self, step: int, draws: Draws) -> Mapping[str, float]:
        """The critic's updates, then one of the generator's (two-time-scale rule)."""
        values: dict[str, float] = {}
        for _ in range(self._settings.critic_updates):
            values.update(self._update_critic(draws))
        values.update(self._update_generator(draws))
        return values

    def _generate(self, draws: Draws, *, grad: bool) -> tuple[torch.Tensor, Conditioning]:
        """Backward simulation: reach a random one of the student's levels by its own steps, then predict x0 there.

        Only the last prediction carries gradient. Of two experts, the levels are those of the one that is compressed;
        its partner makes the steps before. Returns x_g [n, ...] and its conditioning.
        """
        shape, given = self._data.conditions(draws.batch, draws.shared, self._latents, draws.mine)
        given = on(given, self._device)
        sigmas, timesteps, places = self._contract.sigmas, self._contract.timesteps, self._contract.places
        # The same level for all processes: else they would wait for the one with most steps, or hang where weights
        # are split.
        last = places[int(torch.randint(len(places), (), generator=draws.shared))]
        x = self._start(draws.normal(*shape[1:]).to(self._device), given)

        def again(x: torch.Tensor) -> torch.Tensor:
            return draws.normal(*x.shape[1:])

        for place in range(last + 1):
            timestep = torch.full((len(x),), timesteps[place], device=self._device)
            with torch.set_grad_enabled(grad and place == last):
                if place in places or self._partner is None:
                    prediction = self._generator(x, timestep, given)
                else:
                    prediction = predict(self._partner, self._contract, place, x, given, self._negative)
            if place < last:
                x = advance(self._contract, x, prediction, place, again)
        return self._process.tweedie(x, prediction, torch.full((len(x),), sigmas[last], device=self._device)), given

    def _noised(self, x: torch.Tensor, draws: Draws) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_s, s, noise) at levels drawn from the score range and shifted."""
        low, high = self._score_range
        level = draw_levels(draws, self._shift, low=low, high=high).to(self._device)
        noise = draws.normal(*x.shape[1:]).to(self._device)
        return self._process.add_noise(x, noise, level), level, noise

    def _update_critic(self, draws: Draws) -> dict[str, float]:
        x, given = self._generate(draws, grad=False)
        if not self._settings.gan_weight:
            _, level, noise = self._noised(x, draws)
            return self._critic.update(denoising_loss(self._fake, self._process, x, given, level, noise))
        noised, level, noise = self._noised(x, draws)
        prediction, generated = self._critic.module(noised, self._process.timestep(level), given)
        x_real, given_real = self._data.batch(draws.batch, draws.shared, draws.mine)
        real, real_level, _ = self._noised(x_real.to(self._device), draws)
        _, logits = self._critic.module(real, self._process.timestep(real_level), on(given_real, self._device))
        loss = (prediction.float() - self._process.target(x, noise, level)).square().mean()
        return self._critic.update(loss + self._settings.gan_weight * critic_term(logits, generated))

    def _update_generator(self, draws: Draws) -> dict[str, float]:
        x, given = self._generate(draws, grad=True)
        noised, level, _ = self._noised(x, draws)
        timestep = self._process.timestep(level)
        with torch.no_grad():
            fake = self._process.tweedie(noised, self._fake(noised, timestep, given), level)
            guided = self._well_guided(noised.detach(), timestep, given, draws)
            real = self._process.tweedie(noised, guided, level)
            g = matching.gradient(x, fake, real)
        loss = matching.loss(x, g)
        if self._settings.gan_weight:
            # The critic only lends its judgement: its own gradients of this term are thrown away.
            _, logits = self._critic.model(noised, timestep, given)
            loss = loss + self._settings.gan_weight * generator_term(logits)
        values = self.generator.update(loss)
        self._critic.clear()
        scale = self._of_all(matching.normaliser(x.detach(), real), draws)
        moving = x.detach().diff(dim=2).abs().mean()
        return {
            **values,
            "score_gap": float((fake - real).abs().mean()),
            "normaliser_mean": float(scale.mean()),
            "normaliser_min": float(scale.min()),
            "normaliser_max": float(scale.max()),
            "generated_std": float(x.detach().flatten(1).std(dim=1).mean()),
            "generated_motion": float(moving),
        }

    def _of_all(self, values: torch.Tensor, draws: Draws) -> torch.Tensor:
        """One number for each sample of the batch, in every process, from each process's own [n]."""
        world, whole = self.engine.work.world, torch.zeros(draws.batch, dtype=torch.float64)
        whole[draws.mine] = values.double().cpu() * world.size
        return torch.tensor(list(world.mean({str(n): one for n, one in enumerate(whole.tolist())}).values()))

    def _well_guided(self, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning, draws: Draws) -> torch.Tensor:
        """The prediction of the guided teacher.

        Tweedie's formula is affine in the prediction and guidance weights sum to one: guiding either is the same.
        """

        def between(limits: tuple[float, float]) -> torch.Tensor:
            low, high = limits
            drawn = low + (high - low) * draws.uniform()
            return drawn.reshape(-1, *([1] * (x.ndim - 1))).to(self._device)

        inter, intra = between(self._settings.inter_cfg), between(self._settings.intra_cfg)
        conditional, pruned = self._full_and_pruned(x, timestep, given)
        unconditional = conditional
        if self._settings.inter_cfg != (1.0, 1.0):
            unconditional = self._real(x, timestep, without_prompt(given, self._negative))
        return well_guided(unconditional, conditional, pruned, inter, intra)

    def _full_and_pruned(
        self, x: torch.Tensor, timestep: torch.Tensor, given: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The real score's predictions with all blocks and without the prune set; what lies before it is shared."""
        model, graph, skipped = self._real_model, self._real_graph, self._prune_set
        if self._settings.intra_cfg == (0.0, 0.0):
            full = self._real(x, timestep, given)
            return full, full
        if self.engine.splits_weights:
            full = self._real(x, timestep, given)
            with self.engine.skip(model, skipped, graph=graph):
                return full, self._real(x, timestep, given)
        with remember(model, graph, until=skipped[0]) as memory:
            full = self._real(x, timestep, given)
            with memory.skipping(*skipped):
                return full, self._real(x, timestep, given)
