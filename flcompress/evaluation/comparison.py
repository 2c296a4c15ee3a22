"""The suite `moving-digits`: the same held-out prompts and noises for every contender, over several seeds.

Prompts, classifier and figures are those of `flcompress.moving_digits`; runs on other data are refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from flcompress.core.backend import Backend
from flcompress.core.records import EvalFile
from flcompress.core.suites import Suite, SuiteRequest
from flcompress.diffusion.network import CallCounter
from flcompress.driver.rundir import RunDirectory
from flcompress.errors import RequestError
from flcompress.evaluation.contenders import Contender, run_contenders
from flcompress.evaluation.pictures import draw_animation, draw_strips
from flcompress.evaluation.sampling import Studio, judge_real_clips, real_features
from flcompress.models.parts import Parts
from flcompress.moving_digits import digits
from flcompress.moving_digits.classifier import classifier_record
from flcompress.moving_digits.figures import benchmark_figures
from flcompress.progress import ProgressSink
from flcompress.stats import interval, paired

REFERENCE_CLIPS_PER_PROMPT = 64
"""Real clips per held-out caption, of held-out handwriting: the reference of every Frechet distance."""

Judged = dict[str, torch.Tensor]


class MovingDigits(Suite):
    """The embedded benchmark: its own held-out prompts, judged by its own classifier."""

    name: ClassVar[str] = "moving-digits"

    @override
    def evaluate(self, request: SuiteRequest) -> dict[str, Any]:
        for option, value in (
            ("--prompts", request.prompts),
            ("--images", request.images),
            ("--against", request.against[0] if request.against else None),
            ("--dry-run", "" if request.dry_run else None),
        ):
            if value is not None:
                given = f"{value} given" if value else "given"
                raise RequestError(
                    f"{option}: {given}, but the suite moving-digits has prompts and contenders of its own; leave it "
                    "out, or give --suite proxies"
                )
        run = RunDirectory(request.run, request.model)
        size = run.recipe().evaluation
        clips, seeds = request.clips_per_prompt or size.clips_per_prompt, request.seeds or size.seeds
        with request.display.stage("evaluation") as progress:
            return evaluate(
                run,
                clips,
                seeds,
                progress,
                backends=request.backends,
                guidances=request.guidances,
                frame_local=request.frame_local,
                stages=size.stages if request.stages is None else request.stages,
            )


def evaluate(
    run: RunDirectory,
    clips_per_prompt: int,
    seeds: int,
    progress: ProgressSink | None = None,
    contenders: Sequence[str] | None = None,
    backends: Sequence[Backend] = (),
    guidances: Sequence[tuple[float, float]] = (),
    frame_local: float | None = None,
    *,
    stages: bool = True,
) -> dict[str, Any]:
    """Compare the teacher, its shortcuts, the stages and the student of a finished moving-digits run.

    Writes RUN/eval/results.json, RUN/eval/strips/*.png and RUN/eval/comparison.gif; earlier samples come from
    RUN/eval/cache.

    Args:
        run: the run directory.
        clips_per_prompt: clips for each of the 32 held-out prompts and each seed.
        seeds: independent repetitions, at least 2.
        progress: called after every network evaluation of a batch.
        contenders: names to compare; a partial comparison is returned, but not written.
        backends: further ones that run the student, each a contender by itself.
        guidances: (b1, b2) of well-guided teachers, each a contender by itself.
        frame_local: share of the parameters whose blocks attend within latent frames in one more contender.
        stages: whether the pruned model without training and Stage II's are compared, too.

    Raises:
        RequestError: an unfinished run, another dataset, unknown contenders, too few seeds or clips; a backend has no
            export here; a run without scores of temporal attention, for `frame_local`.
        UnavailableError: a backend cannot run on this machine.
    """
    recipe = run.recipe()
    if recipe.data is None or recipe.data.moving_digits is None:
        source = next(iter(recipe.data_spec() or {"none": None}))
        raise RequestError(
            f"{recipe.where('data')}: {source} given, expected moving-digits; only that benchmark has a classifier and "
            "held-out prompts to evaluate with; give --suite proxies"
        )
    run.final().check()
    every = run_contenders(run, backends=backends, guidances=guidances, frame_local=frame_local, stages=stages)
    known = {contender.name: contender for contender in every}
    for name in contenders or ():
        if name not in known:
            raise RequestError(f"contender {name!r}: {run.path} has {', '.join(known)}")
    chosen = [known[name] for name in contenders] if contenders is not None else list(known.values())
    folder, program = run.path / "eval", run.key
    results, shown = evaluate_contenders(
        chosen,
        parts=run.final().parts(),
        clips_per_prompt=clips_per_prompt,
        seeds=seeds,
        progress=progress,
        cache_folder=folder / "cache",
    )
    results = {"program": program, **results}
    if contenders is None:
        _draw(results, shown, folder)
        EvalFile(**results).write(folder / "results.json")
    return results


def evaluate_contenders(
    contenders: Sequence[Contender],
    *,
    parts: Parts,
    clips_per_prompt: int,
    seeds: int,
    progress: ProgressSink | None = None,
    cache_folder: Path | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Sample, judge and compare any contenders that share an autoencoder and a text encoder.

    Args:
        contenders: models to compare; each is paired with all before it.
        parts: autoencoder and text encoders.
        clips_per_prompt: see `evaluate`.
        seeds: see `evaluate`.
        progress: see `evaluate`.
        cache_folder: cache of judgements, keyed by everything that decides them.

    Returns:
        The results, and a few clips of each contender, [prompts shown, 3, frames, height, width] in [-1, 1].

    Raises:
        RequestError: fewer than 2 seeds or 1 clip.
        FlcompressError: a contender gives values that are not finite.
    """
    if clips_per_prompt < 1:
        raise RequestError(f"clips_per_prompt: {clips_per_prompt} given, expected at least 1")
    if seeds < 2:
        raise RequestError(
            f"seeds: {seeds} given, expected at least 2; the confidence interval comes from their spread"
        )
    captions = digits.captions("heldout") * clips_per_prompt
    studio = Studio(parts, captions, cache_folder)
    wanted = [(contender, seed) for contender in contenders for seed in range(seeds)]
    missing = [(c, seed) for c, seed in wanted if not studio.remembers(c, seed)]
    counter = CallCounter(progress, sum(studio.batches * c.evaluations for c, _ in missing))
    judged = {(c.name, seed): studio.judged(c, seed, counter) for c, seed in wanted}
    real = _reference()
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        values = _by_metric([benchmark_figures(judged[contender.name, seed], real) for seed in range(seeds)])
        rows.append(
            {
                "name": contender.name,
                "label": contender.label,
                "steps": contender.contract.num_inference_steps,
                "guidance": contender.contract.guidance_scale,
                "evaluations": contender.evaluations,
                "parameters": contender.parameters,
                **{metric: {**asdict(interval(each)), "values": each} for metric, each in values.items()},
            }
        )
    floor = _by_metric([benchmark_figures(judge_real_clips(captions, "floor", seed), real) for seed in range(seeds)])
    results = {
        "benchmark": "moving-digits",
        "clips": len(captions),
        "seeds": seeds,
        "prompts": len(digits.captions("heldout")),
        "reference_clips": len(real["features"]),
        "classifier": {k: v for k, v in classifier_record().items() if k.endswith("_accuracy")},
        "floor": {metric: {**asdict(interval(each)), "values": each} for metric, each in floor.items()},
        "contenders": rows,
        "paired": [
            {"a": a["name"], "b": b["name"], "metric": m, **asdict(paired(a[m]["values"], b[m]["values"]))}
            for b, a in itertools.combinations(rows, 2)
            for m in floor
        ],
    }
    return results, {c.name: judged[c.name, 0]["shown"].float() / 127.5 - 1.0 for c in contenders}


@cache
def _reference() -> Judged:
    """Return the features of the real clips, each kind [2048, D], the same for every evaluation of a process."""
    return real_features(digits.captions("heldout") * REFERENCE_CLIPS_PER_PROMPT, "reference", 0)


def _by_metric(per_seed: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {metric: [figures[metric] for figures in per_seed] for metric in per_seed[0]}


def _draw(results: dict[str, Any], shown: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the pictures, and add their paths to the results."""
    strips = folder / "strips"
    strips.mkdir(parents=True, exist_ok=True)
    for row in results["contenders"]:
        row["strip"] = f"eval/strips/{row['name']}.png"
        draw_strips({"": shown[row["name"]]}, strips / f"{row['name']}.png")
    labelled = {row["label"]: shown[row["name"]] for row in results["contenders"]}
    draw_strips(labelled, strips / "comparison.png")
    outer = [row for row in results["contenders"] if not row["name"].startswith("stochastic-depth")]
    draw_animation({row["label"]: shown[row["name"]] for row in outer}, folder / "comparison.gif")
