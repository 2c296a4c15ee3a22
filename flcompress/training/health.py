"""Judges a training by its figures: warns, stops it, or sends it back to its best look. See docs/health.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flcompress.errors import TrainingError
from flcompress.pipeline.durable import append_line, write_text
from flcompress.pipeline.passes import Work

HEALTH_FILE, BREACHES_FILE = "health.json", "breaches.jsonl"
"""The limits, and one object for each breach of them: what the report shows beside `metrics.jsonl`."""

GRAD_NORM = "_grad_norm"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What is healthy of one figure.

    Attributes:
        setting: the key of `training.health` that says so.
        low: lowest value, or None.
        high: highest value, or None.
        mend: what to do beyond it.
    """

    setting: str
    low: float | None = None
    high: float | None = None
    mend: str = "lower learning_rate"

    def holds(self, value: float) -> bool:
        """Whether the value is within; one that is not finite never is."""
        return math.isfinite(value) and (self.low is None or value >= self.low) and not self._above(value)

    def _above(self, value: float) -> bool:
        return self.high is not None and value > self.high

    def told(self, figure: str, value: float) -> str:
        """The breach in words."""
        high = self.low is None or self._above(value)
        expected = f"at most {self.high:.4g}" if high else f"at least {self.low:.4g}"
        return f"{figure} {value:.4g}, expected {expected} (training.health.{self.setting}); {self.mend}"


class Watch:
    """Looks at one training again and again, and judges what it and the training itself report.

    Its state is a function of `metrics.jsonl`, so a resumed training judges as an unbroken one. Every process of the
    work's world has one and comes to the same verdict, since figures are agreed upon; only the main one writes.

    Args:
        work: of the pass; its `health` says how often to look and what follows a breach.
        name: of the pass.
        look: step -> held-out figures, the same in every process.
        held_out: the figure among them whose lowest value marks the best look.
        limits: figure, of a look or of a step -> what is healthy.

    Attributes:
        every: steps between two looks.
        best: (step, held-out figure) of the best healthy look; step -1 before the first.
    """

    def __init__(
        self,
        work: Work,
        *,
        name: str,
        look: Callable[[int], Mapping[str, float]],
        held_out: str,
        limits: Mapping[str, Limit] | None = None,
    ) -> None:
        self._work, self._name, self.look, self._held_out = work, name, look, held_out
        self.every = work.health.every
        self.best = (-1, math.inf)
        self._limits = dict(limits or {})
        self._beyond: set[str] = set()

    def resume(self, logged: Iterable[Mapping[str, float]]) -> None:
        """Take up the state after these lines of the log, which the main process gives; all processes together."""
        world = self._work.world
        if world.main:
            for record in logged:
                self._judged(int(record["step"]), record)
            write_text(self._work.directory / HEALTH_FILE, json.dumps(self._settings(), indent=1) + "\n")
        (step, value), beyond = world.once(lambda: [[self.best[0], _finite(self.best[1])], sorted(self._beyond)])
        self.best, self._beyond = (step, math.inf if value is None else value), set(beyond)

    def judge(self, step: int, figures: Mapping[str, float]) -> bool:
        """Take in the figures of a step or a look; whether the training has to go back to its best look and end.

        Raises:
            TrainingError: a figure is beyond its limit and `on_breach` is stop, or there is no look to go back to.
        """
        action = self._work.health.on_breach
        for figure, value, limit in self._judged(step, figures):
            told = limit.told(figure, value)
            back = action == "rollback" and self.best[0] > 0
            line = f"{self._name}: step {step}: {told}; see docs/health.md"
            self._record("rollback" if back else "stop" if action != "warn" else "warn", step, figure, value, limit)
            if back:
                self._work.say(f"{line}; the pass ends with the weights of step {self.best[0]}, the best look")
                return True
            if action == "rollback":
                raise TrainingError(f"{line}; stopped: no look was better than the start")
            if action == "stop":
                raise TrainingError(f"{line}; stopped, the last good checkpoint is kept")
            self._work.say(f"warning: {line}")
        return False

    def _judged(self, step: int, figures: Mapping[str, float]) -> list[tuple[str, float, Limit]]:
        """The figures that have now gone beyond their limits. What a pass starts from is not its doing."""
        beyond = {
            figure: (value, limit)
            for figure, value in figures.items()
            if step > 0 and (limit := self._limit(figure)) is not None and not limit.holds(value)
        }
        fresh = [(figure, *found) for figure, found in beyond.items() if figure not in self._beyond]
        self._beyond = (self._beyond - figures.keys()) | beyond.keys()
        value = figures.get(self._held_out, math.inf)
        if not beyond and value < self.best[1]:
            self.best = (step, value)
        return fresh

    def _limit(self, figure: str) -> Limit | None:
        health = self._work.health
        if figure == self._held_out and health.max_worsening is not None and math.isfinite(self.best[1]):
            return Limit(
                setting="max_worsening",
                high=self.best[1] * (1.0 + health.max_worsening),
                mend=f"the best look, step {self.best[0]}, had {self.best[1]:.4g}: train for fewer steps, or lower "
                "learning_rate",
            )
        if figure.endswith(GRAD_NORM) and health.max_grad_norm is not None:
            return Limit(setting="max_grad_norm", high=health.max_grad_norm)
        return self._limits.get(figure)

    def _settings(self) -> dict[str, Any]:
        limits = {figure: asdict(limit) for figure, limit in self._limits.items() if limit != _none(limit)}
        return {"held_out": self._held_out, "limits": limits, **self._work.health.model_dump(mode="json")}

    def _record(self, action: str, step: int, figure: str, value: float, limit: Limit) -> None:
        if not self._work.world.main:
            return
        told = {
            "step": step,
            "figure": figure,
            "value": _finite(value),
            "low": limit.low,
            "high": limit.high,
            "setting": limit.setting,
            "mend": limit.mend,
            "action": action,
            "best_step": self.best[0],
        }
        append_line(self._work.directory / BREACHES_FILE, json.dumps(told))
        self._work.note("health", self._name, status=action, **told)


def _none(limit: Limit) -> Limit:
    return Limit(setting=limit.setting, mend=limit.mend)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
