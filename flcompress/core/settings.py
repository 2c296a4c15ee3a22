"""Recipe settings: sampling, data, training, health and evaluation. docs/recipes.md is generated from the fields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from flcompress.diffusion.contract import from_conditional_convention

Precision = Literal["fp32", "bf16"]
EngineName = Literal["local", "ddp", "zero1", "zero2", "zero3", "fsdp2"]
AttentionName = Literal["native", "cudnn", "flash", "efficient", "math"]
LogName = Literal["tensorboard", "wandb"]
OffloadName = Literal["moments", "inputs"]
OFFLOADING: tuple[EngineName, ...] = ("local", "ddp", "fsdp2")
"""Engines that can offload: DeepSpeed steps all parameters as one flat tensor."""
OnBreach = Literal["warn", "stop", "rollback"]
Limits = Mapping[str, tuple[float | None, float | None]]
"""Figure -> (lowest, highest) value that is healthy; None where there is no limit on that side."""


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"[{limits[0]:g}, {limits[1]:g}] given, expected [lowest, highest]")
    return limits


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]


def highest(best: float, worsening: float, floor: float = 0.0) -> float:
    """The largest held-out figure that is not surely worse than the best one by more than a share.

    Args:
        best: the lowest figure so far.
        worsening: the share.
        floor: of a squared distance to a reference, which is made of few samples: the expected one of the reference
            itself, made again with other noises. That is twice the mean square of the reference's own error e. By the
            triangle inequality the distances to what the reference stands for are within |e| of the measured ones, now
            and at the best evaluation.
    """
    if floor <= 0.0:
        return best * (1.0 + worsening)
    error = math.sqrt(floor / 2.0)
    return (math.sqrt(1.0 + worsening) * (math.sqrt(best) + error) + error) ** 2


class Settings(BaseModel):
    """Keys of a recipe: immutable, and none that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Health(Settings):
    """Monitoring of trainings. Every figure, its formula and what to do about it: docs/health.md.

    A limit of `null` is none.
    """

    every: int = Field(50, gt=0, description="steps between two held-out evaluations (figures and samples)")
    on_breach: OnBreach = Field(
        "stop",
        description="warn reports it and continues; stop ends the run; rollback ends the pass with the weights of the "
        "evaluation that had the best held-out figure",
    )
    samples: int = Field(8, ge=0, description="fixed prompts that stage III samples at every evaluation; 0 for none")
    max_worsening: float | None = Field(
        2.0,
        gt=0,
        description="by what share the held-out figure may be worse than at the best evaluation, beyond its own spread",
    )
    max_drift: float | None = Field(
        1.0, gt=0, description="by what share the full path's held-out ELBO may be worse than the original's (stage II)"
    )
    deviation: Range | None = Field((0.5, 2.0), description="latent deviation of the samples, over the teacher's")
    motion: Range | None = Field((0.2, 5.0), description="frame-to-frame change of the samples, over the teacher's")
    max_saturation: float | None = Field(
        0.1, gt=0, description="share of the samples' values beyond three of the teacher's deviations"
    )
    max_critic_lag: float | None = Field(
        1.0, gt=0, description="by what share the fake score's loss may exceed the one that it should have"
    )
    min_normaliser: float | None = Field(
        1e-4, gt=0, description="smallest mean |x_g - x_real| of a sample, by which its gradient is divided"
    )
    max_logit_gap: float | None = Field(
        10.0, gt=0, description="mean logit of real clips less that of the generator's, in the adversarial term"
    )
    max_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm, before clipping")

    def evaluations(self, steps: int) -> int:
        """Count the held-out evaluations of a training: before it, at its interval, and after its last step."""
        return 1 + -(-steps // self.every)


class Sampling(Settings):
    """Sampling settings of the model before compression, the reference of every comparison."""

    num_inference_steps: int = Field(50, ge=1, le=1000, description="network calls along a path, guidance aside")
    guidance_scale: float = Field(4.0, ge=0, description="text guidance, in the convention named below")
    guidance_convention: Literal["unconditional", "conditional"] = Field(
        "unconditional", description="`unconditional` is u + w (c - u); `conditional` is c + w (c - u)"
    )
    guidance_scale_2: float | None = Field(
        None,
        ge=0,
        description="the same for the low-noise expert of a model with two; default: guidance_scale",
    )
    negative_prompt: str = Field(
        "",
        description="what text guidance leads away from: the model's own sampling, and the teacher in a distillation",
    )
    max_sequence_length: int = Field(512, ge=1, description="tokens a prompt is padded to")
    embedded_guidance: float | None = Field(
        None,
        gt=0,
        description="scale that a guidance-distilled network takes as an input; default: the family's usual one",
    )
    num_frames: int | None = Field(None, ge=1, description="frames of the clips that are sampled; 1 for images")
    height: int | None = Field(None, ge=1, description="their height in pixels")
    width: int | None = Field(None, ge=1, description="their width in pixels")

    @model_validator(mode="after")
    def _whole_size(self) -> Sampling:
        values = {name: getattr(self, name) for name in ("num_frames", "height", "width")}
        missing = [name for name, value in values.items() if value is None]
        if 0 < len(missing) < 3:
            raise ValueError(
                f"nothing given for {' and '.join(missing)}, expected num_frames, height and width together"
            )
        return self

    @property
    def decisive(self) -> dict[str, Any]:
        """The part of a cache key; an empty negative prompt leaves keys as they were before the setting existed."""
        return self.model_dump(mode="json", exclude=None if self.negative_prompt else {"negative_prompt"})

    @property
    def size(self) -> tuple[int, int, int] | None:
        """(frames, height, width) in pixels of what is sampled; None where the recipe does not say."""
        if self.num_frames is None or self.height is None or self.width is None:
            return None
        return self.num_frames, self.height, self.width

    @property
    def scale(self) -> float:
        """The guidance scale in the convention u + w (c - u)."""
        return self._in_our_convention(self.guidance_scale)

    @property
    def scale_2(self) -> float:
        """The low-noise expert's guidance scale, in the same convention."""
        return self.scale if self.guidance_scale_2 is None else self._in_our_convention(self.guidance_scale_2)

    def _in_our_convention(self, scale: float) -> float:
        if self.guidance_convention == "unconditional":
            return scale
        return from_conditional_convention(scale)


class MovingDigits(Settings):
    """Clips of the embedded benchmark, rendered when needed."""

    clips: int = Field(gt=0, description="training clips to render")


class Videos(Settings):
    """Video files with captions; encoded once, at the size that `sampling` names or their own, and remembered."""

    folder: Path = Field(description="folder of video files; see docs/data.md")
    captions: Path = Field(description="captions of the videos: .jsonl or .csv with file and caption")


class Data(Settings):
    """Where training clips come from: exactly one of the three."""

    moving_digits: MovingDigits | None = Field(None, alias="moving-digits", description="the embedded benchmark")
    latents: Path | None = Field(None, description="folder that `flcompress encode` wrote")
    videos: Videos | None = Field(None, description="video files with captions")

    @model_validator(mode="after")
    def _exactly_one(self) -> Data:
        keys = [key for key, value in self.model_dump(by_alias=True).items() if value is not None]
        if len(keys) != 1:
            raise ValueError(f"{' and '.join(keys) or 'nothing'} given, expected one of moving-digits, latents, videos")
        return self

    @property
    def kind(self) -> str:
        """Return which of the three it is, as the recipe's key."""
        (key,) = (key for key, value in self.model_dump(by_alias=True).items() if value is not None)
        return str(key)


class Evaluation(Settings):
    """Size of the comparison that `flcompress eval` makes."""

    clips_per_prompt: int = Field(3, ge=1, description="clips sampled for each held-out prompt and seed")
    seeds: int = Field(4, ge=2, description="independent repetitions; the confidence intervals come from them")
    stages: bool = Field(
        True,
        description="whether the pruned model without training and what Stage II trained are judged, too, each "
        "at all of the teacher's steps",
    )


_NOT_DECISIVE = {
    "engine",
    "processes",
    "timeout",
    "checkpoint_seconds",
    "background_checkpoints",
    "micro_batch",
    "offload",
    "sequence_parallel",
    "shard_size",
    "attention",
    "deterministic",
    "health",
    "log_to",
}


class Training(Settings):
    """Compute settings of passes that train; they decide memory and speed."""

    engine: EngineName = Field(
        "local",
        description="how the processes of a launcher share a training: ddp copies models, zero1 to zero3 (DeepSpeed) "
        "shard optimiser, gradients and weights, fsdp2 shards all of them; see docs/training.md",
    )
    processes: int | None = Field(
        None, ge=1, description="how many processes must run; default: as many as the launcher started"
    )
    timeout: float = Field(1800.0, gt=0, description="seconds after which a process that does not move ends the run")
    checkpoint_seconds: float = Field(
        60.0,
        ge=0,
        description="between two checkpoints: the most work that a killed run loses, whatever a step takes; 20 times "
        "as long as the last one took where that is more; 0 writes one after every step",
    )
    background_checkpoints: bool = Field(
        False,
        description="copy a checkpoint to host memory and write it while the training continues; the copy takes as "
        "much host memory as each process stores",
    )
    precision: Precision = Field(
        "fp32",
        description="bf16: autocast over fp32 weights; frozen models are held in bf16 and compute in it",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute blocks in the backward pass instead of keeping their activations; a third more work",
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="samples in memory at once in one process, at most; gradients of a larger batch are added up, with "
        "the same result and one optimiser step a batch. Default: its whole share",
    )
    offload: tuple[OffloadName, ...] = Field(
        (),
        description="what waits in host memory, with the same result: moments (AdamW's, and moving averages; they come "
        "to the GPU tensor by tensor to be updated) and inputs (of the blocks, until the backward; with "
        "gradient_checkpointing); engines local, ddp and fsdp2",
    )
    sequence_parallel: int = Field(
        1,
        ge=1,
        description="processes that compute one clip together, each a part of its tokens and in attention of its "
        "heads: for clips whose activations fit no GPU. It divides the processes and the heads; see docs/training.md",
    )
    shard_size: int | None = Field(
        None,
        ge=2,
        description="processes that fsdp2 splits weights, gradients and moments over. Each group holds a copy, and "
        "only gradients go from one to the other (hybrid sharding, HSDP): the GPUs of a machine, where links between "
        "machines are slow. It divides the processes. Default: all of them",
    )
    compile: bool = Field(
        False,
        description="run blocks through torch.compile; on a CPU it needs a C++ compiler and the first steps are slow",
    )

    attention: AttentionName = Field(
        "native",
        description="kernel of attention, through diffusers' switch: native is torch's own choice, without "
        "cuDNN's where there are gradients; the others are that kernel or an error. flash and cudnn compute in half "
        "precision on a GPU, flash without masks",
    )
    deterministic: bool = Field(
        False,
        description="sums in a fixed order on a GPU too, so that a resumed training repeats bit for bit; slower",
    )
    health: Health = Field(Health(), description="how trainings are watched, and what ends one; see docs/health.md")
    log_to: tuple[LogName, ...] = Field(
        ("tensorboard",),
        description="where figures and sample strips go in addition to the report: tensorboard (skipped if it is not "
        "installed) and wandb (which has to be)",
    )

    @model_validator(mode="after")
    def _splits_by_fsdp2(self) -> Training:
        if self.shard_size is not None and self.engine != "fsdp2":
            raise ValueError(
                f"shard_size: {self.shard_size} given with engine: {self.engine}, expected fsdp2; leave it out, or set "
                "engine: fsdp2"
            )
        return self

    @model_validator(mode="after")
    def _offloads_what_it_can(self) -> Training:
        if self.offload and self.engine not in OFFLOADING:
            raise ValueError(
                f"offload: [{', '.join(self.offload)}] given with engine: {self.engine}, expected local, ddp or fsdp2: "
                "DeepSpeed steps all parameters as one flat tensor; set engine: fsdp2, or offload: []"
            )
        if "inputs" in self.offload and not self.gradient_checkpointing:
            raise ValueError(
                "offload: inputs given without gradient_checkpointing, which is what keeps the inputs of blocks; set "
                "gradient_checkpointing: true"
            )
        return self

    @property
    def fewest_processes(self) -> int:
        """The processes that must run, or the fewest that form the groups asked for."""
        return self.processes or math.lcm(self.sequence_parallel, self.shard_size or 1)

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings that change a result; how it is distributed and monitored does not matter.

        So another launch finds and resumes the work, and a training that a limit ended can resume with another limit.
        """
        return self.model_dump(mode="json", exclude=_NOT_DECISIVE)
