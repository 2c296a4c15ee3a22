"""Ablation of the method on moving digits: variants of a recipe, several seeds, one held-out comparison.

`python -m flcompress.evaluation.ablation recipes/moving-digits-ablation.yaml --out runs/ablation` trains every variant
with every seed (results that variants share, such as importance, are computed once), evaluates the students on the same
held-out prompts, and prints a table with the paired difference from the base recipe. An interrupted run resumes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from flcompress.driver.manager import apply
from flcompress.errors import FlcompressError
from flcompress.evaluation.comparison import evaluate
from flcompress.frontend.loading import dump_recipe, load_recipe
from flcompress.progress import QuietDisplay
from flcompress.stats import interval, paired

METRICS = ("frechet", "prompt_accuracy", "average")


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant of the base recipe: with other arguments, or without a pass."""

    name: str
    question: str
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


VARIANTS = (
    Variant("base", "the recipe as it stands"),
    Variant("without-stage-two", "does stochastic depth pay?", without=("stochastic-depth",)),
    Variant("target-self", "whose output is Stage II's target?", ("passes.stochastic-depth.target=self",)),
    Variant("target-ema", "whose output is Stage II's target?", ("passes.stochastic-depth.target=ema",)),
    Variant("real-elastic", "whose weights are the real score?", ("passes.dmd.real_score=elastic",)),
    Variant("intra-0", "b2 = 0", ("passes.dmd.intra_cfg=[0.0, 0.0]",)),
    Variant("intra-0.75", "b2 = 0.75", ("passes.dmd.intra_cfg=[0.75, 0.75]",)),
    Variant("blocks-random", "which blocks go?", ("passes.stochastic-depth.by=random", "passes.prune.by=random")),
    Variant("blocks-middle", "which blocks go?", ("passes.stochastic-depth.by=middle", "passes.prune.by=middle")),
)


def ablate(base: Path, out: Path, seeds: int, variants: Sequence[Variant] = VARIANTS) -> dict[str, Any]:
    """Train and evaluate every variant with every seed; write and return `out/results.json`.

    A variant that its own monitor stops (TrainingError) is reported as failed, with the reason.
    """
    values: dict[str, dict[str, list[float]]] = {}
    failed: dict[str, str] = {}
    for variant in variants:
        try:
            figures = [_figures(base, out, variant, seed) for seed in range(seeds)]
        except FlcompressError as error:
            failed[variant.name] = str(error)
            click.echo(f"{variant.name}: {error}")
            continue
        values[variant.name] = {metric: [figure[metric] for figure in figures] for metric in METRICS}
        click.echo(row(variant.name, values))
    results = {
        "recipe": str(base),
        "seeds": seeds,
        "failed": failed,
        "variants": [
            {
                "name": variant.name,
                "question": variant.question,
                **{metric: asdict(interval(values[variant.name][metric])) for metric in METRICS},
                "against_base": {
                    metric: asdict(paired(values[variant.name][metric], values["base"][metric])) for metric in METRICS
                },
            }
            for variant in variants
            if variant.name in values and "base" in values
        ],
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def row(name: str, values: dict[str, dict[str, list[float]]]) -> str:
    """Return a line of the table: means with 95 % intervals, and the paired difference in Frechet distance to base."""
    cells = []
    for metric in METRICS:
        mean = interval(values[name][metric])
        cells.append(f"{metric} {mean.mean:.3f} [{mean.low:.3f}, {mean.high:.3f}]")
    if name != "base" and "base" in values:
        difference = paired(values[name]["frechet"], values["base"]["frechet"])
        cells.append(f"frechet - base {difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]")
    return f"{name}: " + ", ".join(cells)


def _figures(base: Path, out: Path, variant: Variant, seed: int) -> dict[str, float]:
    """Return the mean metrics of a variant's student trained with one seed."""
    plain = yaml.safe_load(dump_recipe(load_recipe(base)))
    plain["passes"] = [step for step in plain["passes"] if next(iter(step)) not in variant.without]
    plain["name"] = f"{variant.name}-{seed}".replace(".", "-")
    plain["seed"] = seed
    path = out / "recipes" / f"{plain['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    recipe = load_recipe(path, variant.overrides)
    run = apply(recipe, out / "runs" / plain["name"], store=out / "store", display=QuietDisplay())
    size = recipe.evaluation
    (student,) = evaluate(run, size.clips_per_prompt, size.seeds, contenders=["student"])["contenders"]
    return {metric: float(student[metric]["mean"]) for metric in METRICS}


@click.command()
@click.argument("recipe", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/ablation"), show_default=True)
@click.option("--seeds", type=click.IntRange(min=2), default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice([variant.name for variant in VARIANTS]), help="Repeatable.")
def main(recipe: Path, out: Path, seeds: int, only: Sequence[str]) -> None:
    """Train the variants of RECIPE with several seeds and compare their students on held-out prompts."""
    chosen = [variant for variant in VARIANTS if not only or variant.name in (*only, "base")]
    try:
        ablate(recipe, out, seeds, chosen)
    except FlcompressError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
