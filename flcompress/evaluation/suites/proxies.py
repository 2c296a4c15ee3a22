"""The suite `proxies`: motion, colour, sharpness and distances that need no trained network.

A figure that stands for one that does is named `proxy_*`. What each is, and how it was validated: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from typing_extensions import override

from flcompress.clip_figures import Frames
from flcompress.clip_figures.features import clip_features, latent_features, relations
from flcompress.clip_figures.motion import motion, smoothness
from flcompress.clip_figures.pixels import colour, flicker, imaging, psnr, ssim
from flcompress.evaluation.suites.clip_suite import ClipContext, ClipSuite
from flcompress.evaluation.suites.tables import Figure, Measurement
from flcompress.stats import frechet_distance

QUANTILES = (0.05, 0.95)
"""Between these of the real clips a clip's sharpness, noise and clipping are as those of real ones."""

MIN_REAL = 8
"""Real clips below which their quantiles are not known."""

LEAST_MOTION = 0.8
"""A student that moves less than this share of its teacher is reported."""


class Proxies(ClipSuite):
    """Figures of clips that need no download."""

    name: ClassVar[str] = "proxies"
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(key="proxy_dynamic", label="Dynamic (proxy)", better=0, headline=True),
        Figure(key="flow", label="Motion, pixels at 256", better=0, headline=True),
        Figure(key="proxy_smoothness", label="Smoothness (proxy)", better=1),
        Figure(key="flicker", label="Flicker (VBench)", better=0),
        Figure(key="proxy_imaging", label="Imaging (proxy)", better=1),
        Figure(key="sharpness", label="Sharpness", better=0),
        Figure(key="noise", label="Noise", better=0),
        Figure(key="clipping", label="Clipping", better=0),
        Figure(key="saturation", label="Saturation", better=0, headline=True),
        Figure(key="saturation_p95", label="Saturation, 95th", better=0),
        Figure(key="contrast", label="Contrast", better=0),
        Figure(key="first_frame_psnr", label="First frame, PSNR", better=1),
        Figure(key="first_frame_ssim", label="First frame, SSIM", better=1),
        Figure(key="first_frame_decay", label="SSIM lost to the last frame", better=0),
        Figure(key="relation", label="Temporal structure off", better=-1),
        Figure(key="diversity", label="Diversity of seeds", better=0),
        Figure(key="frechet_latents", label="Fréchet, latents", better=-1),
        Figure(key="frechet_random", label="Fréchet, random features", better=-1, headline=True),
        Figure(key="teacher_psnr", label="Teacher, PSNR", better=0),
        Figure(key="teacher_ssim", label="Teacher, SSIM", better=0),
        Figure(key="teacher_latents", label="Teacher, latent distance", better=0),
    )

    @override
    def measure(self, frames: Frames, context: ClipContext) -> Measurement:
        moved, smooth, flickering = motion(frames, context.frame_rate), smoothness(frames), flicker(frames)
        figures: dict[str, float] = {**colour(frames), **imaging(frames)}
        if moved is not None:
            figures["flow"] = moved.flow
            if moved.dynamic is not None:
                figures["proxy_dynamic"] = float(moved.dynamic)
        if smooth is not None:
            figures["proxy_smoothness"] = smooth
        if flickering is not None:
            figures["flicker"] = flickering
        if context.image is not None:
            first, last = ssim(frames[0], context.image), ssim(frames[-1], context.image)
            figures["first_frame_psnr"] = psnr(frames[0], context.image)
            figures |= {"first_frame_ssim": first, "first_frame_decay": first - last}
        latents = context.encode(frames)
        teacher = context.teacher
        if teacher is not None and teacher.shape == frames.shape:
            pairs = zip(frames, teacher, strict=True)
            figures["teacher_psnr"] = psnr(frames, teacher)
            figures["teacher_ssim"] = float(np.mean([ssim(a, b) for a, b in pairs]))
            figures["teacher_latents"] = float((latents - context.encode(teacher)).square().mean().sqrt())
        features = {"random": clip_features(frames), "latents": latent_features(latents)}
        if len(frames) > 1:
            features["relations"] = relations(frames)
        return Measurement(figures=figures, features=features)

    @override
    def of_clip(self, clip: Measurement, real: Sequence[Measurement]) -> Mapping[str, float]:
        figures = dict(clip.figures)
        if len(real) >= MIN_REAL:
            bounds = {
                key: np.quantile([each.figures[key] for each in real], QUANTILES)
                for key in ("sharpness", "noise", "clipping")
            }
            inside = [low <= figures[key] <= high for key, (low, high) in bounds.items()]
            figures["proxy_imaging"] = float(np.mean(inside))
        if real and "relations" in clip.features and "relations" in real[0].features:
            usual = np.mean([each.features["relations"] for each in real], axis=0)
            figures["relation"] = float(np.abs(clip.features["relations"] - usual).mean())
        return figures

    @override
    def of_prompt(self, clips: Sequence[Measurement]) -> Mapping[str, float]:
        vectors = [clip.features["random"] for clip in clips]
        distances = [float(np.linalg.norm(a - b)) for i, a in enumerate(vectors) for b in vectors[:i]]
        return {"diversity": float(np.mean(distances))} if distances else {}

    @override
    def of_set(self, clips: Sequence[Measurement], real: Sequence[Measurement]) -> Mapping[str, float]:
        if min(len(clips), len(real)) < 2:
            return {}

        def distance(name: str) -> float:
            sets = [torch.from_numpy(np.stack([clip.features[name] for clip in each])) for each in (clips, real)]
            return frechet_distance(*sets)

        return {"frechet_latents": distance("latents"), "frechet_random": distance("random")}

    @override
    def warnings(self, figures: Mapping[str, Mapping[str, float]], surely_higher: Mapping[str, bool]) -> list[str]:
        if "student" not in figures:
            return []
        (name, teacher), student = next(iter(figures.items())), figures["student"]
        lines = []
        if teacher.get("flow", 0.0) > 0.0 and student["flow"] < LEAST_MOTION * teacher["flow"]:
            lines.append(
                f"warning: the student moves {student['flow'] / teacher['flow']:.0%} as much as {name} (flow "
                f"{student['flow']:.3g} against {teacher['flow']:.3g} pixels); expected at least {LEAST_MOTION:.0%}: "
                "look at its clips, train for fewer steps, or lower the guidance of its distillation"
            )
        if surely_higher.get("saturation"):
            lines.append(
                f"warning: the student saturates more than {name} ({student['saturation']:.3g} against "
                f"{teacher['saturation']:.3g}, beyond the interval of the difference): a sign of over-training; train "
                "for fewer steps, or lower inter_cfg"
            )
        return lines
