"""The report's part of an evaluation suite: its table, motion and colour, worst prompts, clips side by side."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from markupsafe import Markup

from flcompress.core.records import EvalFile, ScoreLine
from flcompress.reporting import plots
from flcompress.reporting.quality import Quality, quality
from flcompress.reporting.reading import RunRecord

WORST = 5
"""Prompts that are listed as worst."""

PLOTTED = (("flow", "motion"), ("saturation", "saturation"))
LONGEST_PROMPT = 160


@dataclass(frozen=True, kw_only=True)
class WorstPrompt:
    """A prompt on which the student moves little, next to its teacher's motion."""

    prompt: str
    student: float
    teacher: float

    @property
    def share(self) -> float:
        """The student's motion over the teacher's."""
        return self.student / self.teacher if self.teacher else 1.0


@dataclass(frozen=True, kw_only=True)
class SuitePart:
    """What the page shows of a suite; `videos` are (prompt, data address)."""

    quality: Quality
    plot: Markup | None
    worst: list[WorstPrompt]
    videos: list[tuple[str, str]]


def suite_part(run: RunRecord, name: str, results: EvalFile) -> SuitePart:
    """Return what the page shows of a suite's results."""
    scores = ScoreLine.read_lines(run.path / "eval" / name / "clips.jsonl")
    return SuitePart(
        quality=quality(results),
        plot=_plot(results),
        worst=worst_prompts(scores, results.contenders[0].name),
        videos=_videos(run, name),
    )


def worst_prompts(scores: list[ScoreLine], teacher: str, figure: str = "flow") -> list[WorstPrompt]:
    """Return the prompts with the lowest share of the teacher's figure, the lowest first."""
    sums: dict[tuple[str, str], list[float]] = {}
    for score in scores:
        if figure in score.figures:
            sums.setdefault((score.contender, score.prompt), []).append(score.figures[figure])
    means = {key: sum(values) / len(values) for key, values in sums.items()}
    rows = [
        WorstPrompt(prompt=_short(prompt), student=value, teacher=means[teacher, prompt])
        for (contender, prompt), value in means.items()
        if contender == "student" and (teacher, prompt) in means
    ]
    return sorted(rows, key=lambda row: row.share)[:WORST]


def _plot(results: EvalFile) -> Markup | None:
    panels = [
        (label, [(row.label, row.figures[key].interval) for row in results.contenders if key in row.figures])
        for key, label in PLOTTED
    ]
    panels = [panel for panel in panels if panel[1]]
    return Markup(plots.intervals(panels, f"{results.benchmark}-figures")) if panels else None


def _videos(run: RunRecord, name: str) -> list[tuple[str, str]]:
    folder = f"eval/{name}/side-by-side"
    videos = []
    for line in ScoreLine.read_lines(run.path / folder / "clips.jsonl"):
        file = run.inside(f"{folder}/{line.file}")
        if file is not None:
            address = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
            videos.append((_short(line.prompt), address))
    return videos


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= LONGEST_PROMPT else f"{prompt[:LONGEST_PROMPT]}..."
