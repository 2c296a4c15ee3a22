"""Train the benchmark's classifier from real clips and store it with its accuracy on held-out handwriting.

python -m flcompress.moving_digits.classifier_training --out flcompress/moving_digits/classifier
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flcompress.draws import generator
from flcompress.errors import FlcompressError
from flcompress.moving_digits import digits
from flcompress.moving_digits.classifier import (
    CONFIG_FILE,
    FEATURES,
    FOLDER,
    WEIGHTS_FILE,
    WIDTHS,
    Classifier,
    Judgement,
    judge,
    labels,
)
from flcompress.moving_digits.damage import damage
from flcompress.moving_digits.digits import Caption, Split
from flcompress.progress import ProgressSink

STEPS = 1500
BATCH = 64
LEARNING_RATE = 3e-3
WARMUP = 50
QUALITY_WEIGHT = 5.0
TILT_DEGREES = 8.0
STRETCH = 0.08
HELDOUT_CLIPS = 4096
STATISTICS_CLIPS = 2048


def every_caption() -> tuple[Caption, ...]:
    """Return all 160 captions: the classifier judges, and need not generalise to new captions."""
    return digits.captions("train") + digits.captions("heldout")


def real_clips(n: int, split: Split, draw: torch.Generator) -> tuple[torch.Tensor, tuple[Caption, ...]]:
    """Render clips [n, 3, frames, height, width] of a split's handwriting with any of the 160 captions."""
    known = every_caption()
    wanted = tuple(known[int(i)] for i in torch.randint(len(known), (n,), generator=draw))
    return digits.render(wanted, split, draw), wanted


def tilt(clips: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Augment handwriting: tilt, slant and stretch whole clips slightly, the same in every frame."""
    n, colours, frames, height, width = clips.shape
    angle = (2.0 * torch.rand(n, generator=draw) - 1.0) * math.radians(TILT_DEGREES)
    stretch = 1.0 + STRETCH * (2.0 * torch.rand(n, 2, generator=draw) - 1.0)
    slant = 1.5 * STRETCH * (2.0 * torch.rand(n, generator=draw) - 1.0)
    across = torch.stack([angle.cos() * stretch[:, 0], -angle.sin() + slant, torch.zeros(n)], dim=1)
    down = torch.stack([angle.sin(), angle.cos() * stretch[:, 1], torch.zeros(n)], dim=1)
    pictures = clips.reshape(n, colours * frames, height, width) + 1.0
    grid = F.affine_grid(torch.stack([across, down], dim=1), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", align_corners=False).reshape(clips.shape) - 1.0


def loss(judged: Judgement, wanted: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of the three labels, weighted by quality, plus the squared error of the quality."""
    scores = (judged.digit, judged.direction, judged.speed)
    named = sum(F.cross_entropy(s, wanted[:, i], reduction="none") for i, s in enumerate(scores))
    return (quality * named).mean() + QUALITY_WEIGHT * F.mse_loss(judged.quality, quality)


def accuracy(classifier: Classifier, clips: int, seed: int) -> dict[str, float]:
    """Return the classifier's accuracy on real clips of held-out handwriting, and statistics of its quality.

    `quality_correlation` is Pearson's, over damaged clips, between true and predicted quality; `clean_quality` is the
    mean prediction for undamaged ones.
    """
    draw = generator(seed, "classifier-heldout")
    real, wanted = real_clips(clips, "heldout", draw)
    judged, known = judge(classifier, real), labels(wanted)
    right = torch.stack(
        [s.argmax(dim=1) == known[:, i] for i, s in enumerate((judged.digit, judged.direction, judged.speed))], dim=1
    )
    damaged, quality = damage(real, draw)
    damaged_judgement = judge(classifier, damaged)
    share = right.double().mean(dim=0).tolist()
    return {
        "digit_accuracy": share[0],
        "direction_accuracy": share[1],
        "speed_accuracy": share[2],
        "joint_accuracy": float(right.all(dim=1).double().mean()),
        "clean_quality": float(judged.quality.mean()),
        "quality_correlation": float(torch.corrcoef(torch.stack([quality, damaged_judgement.quality]))[0, 1]),
    }


def train_classifier(
    folder: Path, steps: int = STEPS, seed: int = 0, progress: ProgressSink | None = None, heldout: int = HELDOUT_CLIPS
) -> dict[str, Any]:
    """Train on the training handwriting with all 160 captions, measure on the held-out one, store both.

    Args:
        folder: gets `model.safetensors` and `config.json`.
        steps: updates of `BATCH` clips.
        seed: seed of the initialisation and, with its number, of each step.
        progress: called after every step.
        heldout: number of real clips on which the accuracy is measured.

    Returns:
        The contents of `config.json`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    for step in range(steps):
        draw = generator(seed, "classifier", step)
        clips, wanted = real_clips(BATCH, "train", draw)
        clips, quality = damage(tilt(clips, draw), draw)
        value = loss(classifier(clips), labels(wanted), quality)
        value.backward()  # type: ignore[no-untyped-call]
        rise, done = min(1.0, (step + 1) / WARMUP), step / steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rise * 0.5 * (1.0 + math.cos(math.pi * done))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, steps, {"loss": float(value.detach())})
    classifier.eval().requires_grad_(False)
    _standardise(classifier, seed)
    record = {
        "widths": list(WIDTHS),
        "features": FEATURES,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "training": {"steps": steps, "batch": BATCH, "seed": seed, "learning_rate": LEARNING_RATE},
        "heldout_clips": heldout,
        **accuracy(classifier, heldout, seed),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in classifier.state_dict().items()}, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _standardise(classifier: Classifier, seed: int) -> None:
    """Give every feature mean 0 and variance 1 over real training clips, so that no unit dominates the distance."""
    clips, _ = real_clips(STATISTICS_CLIPS, "train", generator(seed, "classifier-statistics"))
    features = judge(classifier, clips).features
    classifier.feature_mean.copy_(features.mean(dim=0))
    classifier.feature_scale.copy_(features.std(dim=0).clamp(min=1e-3))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: Path, steps: int, seed: int) -> None:
    """Train the moving-digits classifier and store it."""

    def show(done: int, total: int, values: Any) -> None:
        if done % 50 == 0 or done == total:
            click.echo(f"{done}/{total} loss {values['loss']:.4f}", err=True)

    try:
        click.echo(json.dumps(train_classifier(out, steps, seed, show), indent=1))
    except FlcompressError as error:
        raise SystemExit(error.exit_status) from error


if __name__ == "__main__":
    main()
