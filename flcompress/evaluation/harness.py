"""The benchmark: the same held-out prompts and the same noises for every contender, over several seeds."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from flcompress.data import moving_digits
from flcompress.data.moving_digits import Caption
from flcompress.diffusion.sampling import Network, sample
from flcompress.draws import generator
from flcompress.errors import FlcompressError, RequestError
from flcompress.evaluation import metrics
from flcompress.evaluation.classifier import FOLDER, classifier_record, judge, labels, load_classifier
from flcompress.evaluation.contenders import Contender, run_contenders
from flcompress.evaluation.pictures import SHOWN, draw_comparison, draw_strip
from flcompress.models.loading import load_text, load_vae
from flcompress.models.text import encode_prompts
from flcompress.models.video import decode_latents, encode_clips
from flcompress.pipeline.durable import write_text
from flcompress.pipeline.passes import ProgressSink
from flcompress.pipeline.program import folder_digest
from flcompress.pipeline.rundir import RunDirectory
from flcompress.pipeline.store import key_of

VERSION = 1
"""Raise it when the same weights would give other clips or judgements: it is part of the cache key."""

BATCH = 96
REFERENCE_CLIPS_PER_PROMPT = 64
"""Real clips, of held-out handwriting and the held-out captions, that every Frechet distance is measured from."""

Judged = dict[str, torch.Tensor]


def evaluate(
    run: RunDirectory,
    clips_per_prompt: int,
    seeds: int,
    progress: ProgressSink | None = None,
    contenders: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare the teacher, its shortcuts, the stages and the student of a finished run.

    Writes RUN/eval/results.json, RUN/eval/strips/*.png and RUN/eval/comparison.gif; what was sampled before is taken
    from RUN/eval/cache.

    Args:
        run: the run directory.
        clips_per_prompt: clips for each of the 32 held-out prompts and each seed.
        seeds: independent repetitions, at least 2.
        progress: told after every network evaluation of a batch.
        contenders: names to compare; such a part of the comparison is returned, but not written.

    Raises:
        RequestError: an unfinished run, another dataset, unknown contenders, too few seeds or clips.
    """
    recipe = run.recipe()
    if recipe.data is None or recipe.data.moving_digits is None:
        given = next(iter(recipe.data_spec() or {"none": None}))
        raise RequestError(
            f"{recipe.where('data')}: {given} given, expected moving-digits; only that benchmark has a classifier and "
            "held-out prompts to evaluate with"
        )
    known = {contender.name: contender for contender in run_contenders(run)}
    for name in contenders or ():
        if name not in known:
            raise RequestError(f"contender {name!r}: {run.path} has {', '.join(known)}")
    chosen = [known[name] for name in contenders] if contenders is not None else list(known.values())
    folder = run.path / "eval"
    results, shown = evaluate_contenders(
        chosen,
        components=run.final().components,
        clips_per_prompt=clips_per_prompt,
        seeds=seeds,
        progress=progress,
        cache_folder=folder / "cache",
    )
    if contenders is None:
        _draw(results, shown, folder)
        write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    return results


def evaluate_contenders(
    contenders: Sequence[Contender],
    *,
    components: Mapping[str, Path],
    clips_per_prompt: int,
    seeds: int,
    progress: ProgressSink | None = None,
    cache_folder: Path | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Sample, judge and compare any contenders that share an autoencoder and a text encoder.

    Args:
        contenders: what to compare; paired differences are of each with those before it.
        components: folders of "vae", "text_encoder" and "tokenizer".
        clips_per_prompt, seeds, progress: as in `evaluate`.
        cache_folder: where judgements are remembered, by everything that decides them.

    Returns:
        The results, and of each contender a few clips [prompts shown, 3, frames, height, width] in [-1, 1].

    Raises:
        RequestError: fewer than 2 seeds or 1 clip.
        FlcompressError: a contender gives values that are not finite.
    """
    if clips_per_prompt < 1:
        raise RequestError(f"clips_per_prompt: {clips_per_prompt} given, expected at least 1")
    if seeds < 2:
        raise RequestError(f"seeds: {seeds} given, expected at least 2; the confidence interval comes from their spread")
    captions = moving_digits.captions("heldout") * clips_per_prompt
    studio = _Studio(components, captions, cache_folder)
    wanted = [(contender, seed) for contender in contenders for seed in range(seeds)]
    missing = [(c, seed) for c, seed in wanted if not studio.remembers(c, seed)]
    counter = _Counter(progress, sum(studio.batches * c.contract.evaluations for c, _ in missing))
    judged = {(c.name, seed): studio.judged(c, seed, counter) for c, seed in wanted}
    real = _reference()
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        values = _by_metric([metrics.figures(judged[contender.name, seed], real) for seed in range(seeds)])
        rows.append(
            {
                "name": contender.name,
                "label": contender.label,
                "steps": contender.contract.num_inference_steps,
                "guidance": contender.contract.guidance_scale,
                "evaluations": contender.contract.evaluations,
                "parameters": contender.parameters,
                **{metric: {**metrics.interval(each), "values": each} for metric, each in values.items()},
            }
        )
    floor = _by_metric([metrics.figures(_real(captions, "floor", seed), real) for seed in range(seeds)])
    results = {
        "benchmark": "moving-digits",
        "clips": len(captions),
        "seeds": seeds,
        "prompts": len(moving_digits.captions("heldout")),
        "reference_clips": len(real),
        "classifier": {k: v for k, v in classifier_record().items() if k.endswith("_accuracy")},
        "floor": {metric: {**metrics.interval(each), "values": each} for metric, each in floor.items()},
        "contenders": rows,
        "paired": [
            {"a": a["name"], "b": b["name"], "metric": m, **metrics.paired(a[m]["values"], b[m]["values"])}
            for b, a in itertools.combinations(rows, 2)
            for m in floor
        ],
    }
    return results, {c.name: judged[c.name, 0]["shown"].float() / 127.5 - 1.0 for c in contenders}


@dataclass
class _Counter:
    """Tells the progress after every network evaluation."""

    progress: ProgressSink | None
    total: int
    done: int = 0

    def around(self, network: Network) -> Network:
        def call(x: torch.Tensor, timestep: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
            v = network(x, timestep, embeds)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, {})
            return v

        return call


class _Studio:
    """Samples a contender on the prompts of the benchmark, or remembers what it gave."""

    def __init__(self, components: Mapping[str, Path], captions: tuple[Caption, ...], cache_folder: Path | None) -> None:
        self._components = components
        self._captions = captions
        self._cache = cache_folder
        self._loaded = cache(self._load)
        self.batches = -(-len(captions) // BATCH)
        self._decided_by = {
            "version": VERSION,
            "prompts": [caption.text for caption in captions],
            "classifier": folder_digest(FOLDER),
            **{name: folder_digest(components[name]) for name in ("vae", "text_encoder", "tokenizer")},
        }

    def remembers(self, contender: Contender, seed: int) -> bool:
        path = self._path(contender, seed)
        return path is not None and path.exists()

    def judged(self, contender: Contender, seed: int, counter: _Counter) -> Judged:
        path = self._path(contender, seed)
        if path is not None and path.exists():
            return load_file(path)
        clips = self._clips(contender, seed, counter)
        shown = clips[list(SHOWN)]
        made = {**_judge(clips, self._captions), "shown": ((shown + 1.0) * 127.5).round().byte()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            save_file({name: value.contiguous() for name, value in made.items()}, temporary)
            temporary.replace(path)
        return made

    def _path(self, contender: Contender, seed: int) -> Path | None:
        if self._cache is None or not contender.identity:
            return None
        contract = contender.contract.to_dict()
        key = key_of(**self._decided_by, identity=contender.identity, contract=contract, seed=seed)
        return self._cache / f"{key}.safetensors"

    def _load(self, length: int) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Size]:
        """Autoencoder, prompt embeddings [n, T, D], the empty prompt's [T, D], shape of one clip's latents."""
        vae = load_vae(self._components["vae"])
        texts = load_text(self._components["text_encoder"], self._components["tokenizer"])
        prompts = moving_digits.captions("heldout")
        embeds = encode_prompts(*texts, [*(caption.text for caption in prompts), ""], length)
        one = torch.zeros(1, 3, moving_digits.FRAMES, moving_digits.HEIGHT, moving_digits.WIDTH)
        repeated = embeds[:-1].repeat(len(self._captions) // len(prompts), 1, 1)
        return vae, repeated, embeds[-1], encode_clips(vae, one).shape[1:]

    @torch.no_grad()
    def _clips(self, contender: Contender, seed: int, counter: _Counter) -> torch.Tensor:
        vae, embeds, negative, shape = self._loaded(contender.contract.max_sequence_length)
        noise = torch.randn(len(embeds), *shape, generator=generator("evaluation", "noise", seed))
        network = counter.around(contender.network)
        clips = []
        for number, (start, prompt) in enumerate(zip(noise.split(BATCH), embeds.split(BATCH), strict=True)):
            again = generator("evaluation", "noise again", seed, number)
            latents = sample(network, contender.contract, start, prompt, negative, again)
            if not bool(torch.isfinite(latents).all()):
                raise FlcompressError(
                    f"{contender.name}: its latents are not finite at seed {seed}; expected numbers. Its training went "
                    "wrong: look at the losses in the report and lower learning_rate"
                )
            clips.append(decode_latents(vae, latents).float())
        return torch.cat(clips)


def _judge(clips: torch.Tensor, captions: tuple[Caption, ...]) -> Judged:
    says, known = judge(_classifier(), clips), labels(captions)
    return {
        "features": says.features,
        "digit": says.digit.argmax(dim=1) == known[:, 0],
        "direction": says.direction.argmax(dim=1) == known[:, 1],
        "speed": says.speed.argmax(dim=1) == known[:, 2],
        "quality": says.quality,
        "smoothness": metrics.motion_smoothness(clips),
        "moves": metrics.moves(clips),
    }


@cache
def _classifier() -> Any:
    return load_classifier()


@cache
def _reference() -> torch.Tensor:
    """Features of the real clips [2048, D]; the same for every evaluation of a process."""
    return _real(moving_digits.captions("heldout") * REFERENCE_CLIPS_PER_PROMPT, "reference", 0)["features"]


def _real(captions: tuple[Caption, ...], purpose: str, seed: int) -> Judged:
    clips = moving_digits.render(captions, "heldout", generator("evaluation", purpose, seed))
    return _judge(clips, captions)


def _by_metric(per_seed: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {metric: [figures[metric] for figures in per_seed] for metric in per_seed[0]}


def _draw(results: dict[str, Any], shown: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the pictures, and name them in the results."""
    strips = folder / "strips"
    strips.mkdir(parents=True, exist_ok=True)
    for row in results["contenders"]:
        row["strip"] = f"eval/strips/{row['name']}.png"
        draw_strip(shown[row["name"]], strips / f"{row['name']}.png")
    draw_comparison({row["label"]: shown[row["name"]] for row in results["contenders"]}, folder)
