"""Judge a training by its figures: warn, stop it, or roll it back to its best evaluation. See docs/health.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from flcompress.core.records import BreachLine, HealthFile, RedrawsLine
from flcompress.core.settings import highest
from flcompress.core.steps import PassContext
from flcompress.errors import TrainingError
from flcompress.files import append_line

HEALTH_FILE, BREACHES_FILE, REDRAWS_FILE = "health.json", "breaches.jsonl", "redraws.jsonl"
"""The limits, one object for each breach of them, and one for each evaluation's figures on other draws: what the report
shows in addition to `metrics.jsonl`.
"""

REDRAWS = 8
"""Other draws on which a held-out evaluation repeats its figures.

A figure that luck alone puts beyond its limit on half of all draws is beyond it on all of these in 1 evaluation of 256;
tests/training/watching/test_redraws.py has the rates of whole trainings.
"""

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Redraws:
    """The figures of a held-out evaluation on other draws, the same ones at every evaluation.

    Attributes:
        draws: figures of the evaluated weights, one mapping for each draw.
        reference: the same of what they are compared with, such as the teacher; empty where there is none.
    """

    draws: Sequence[Figures] = ()
    reference: Sequence[Figures] = ()

    def values(self, figure: str) -> list[float]:
        """Return a figure on each of the draws."""
        return [draw[figure] for draw in self.draws if figure in draw]

    def reference_values(self, figure: str) -> list[float]:
        """Return a figure of the reference on each of the draws."""
        return [draw[figure] for draw in self.reference if figure in draw]


NO_REDRAWS = Redraws()

GRAD_NORM = "_grad_norm"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Healthy range of one metric.

    Attributes:
        setting: the key of `training.health` that sets it.
        low: lowest healthy value, or None.
        high: highest healthy value, or None.
        fix: what to do about a breach.
    """

    setting: str
    low: float | None = None
    high: float | None = None
    fix: str = "lower learning_rate"

    def holds(self, value: float) -> bool:
        """Return whether the value is in the range; one that is not finite never is."""
        return math.isfinite(value) and (self.low is None or value >= self.low) and not self._above(value)

    def widen(self, values: Sequence[float]) -> Limit:
        """Return a limit within which these values are healthy, too."""
        low = self.low if self.low is None else min([self.low, *values])
        high = self.high if self.high is None else max([self.high, *values])
        return replace(self, low=low, high=high)

    def _above(self, value: float) -> bool:
        return self.high is not None and value > self.high

    def describe(self, figure: str, value: float, redrawn: Sequence[float] = ()) -> str:
        """Describe a breach; with the range of the same figure on other draws, if any."""
        high = self.low is None or self._above(value)
        expected = f"at most {self.high:.4g}" if high else f"at least {self.low:.4g}"
        others = f" ({min(redrawn):.4g} to {max(redrawn):.4g} on {len(redrawn)} other draws)" if redrawn else ""
        return f"{figure} {value:.4g}{others}, expected {expected} (training.health.{self.setting}); {self.fix}"


@dataclass(frozen=True, kw_only=True)
class _Breach:
    """A figure beyond its limit, and what it is on other draws."""

    figure: str
    value: float
    limit: Limit
    redrawn: Sequence[float]

    @property
    def description(self) -> str:
        return self.limit.describe(self.figure, self.value, self.redrawn)


class Watch:
    """Evaluates one training at intervals, and judges these figures and those that the training itself reports.

    The figures of a held-out evaluation come from few draws (noises, clips), so each has a spread. `redraw` repeats
    them on other draws, the same ones every time. A figure breaches its limit if it does so on every draw. A limit
    relative to the best evaluation compares each draw with the same draw there; the best evaluation is the one with the
    lowest mean over all draws. No limit is narrower than the reference's own spread over other draws.

    Its state is a function of `metrics.jsonl` and `redraws.jsonl`, so a resumed training judges as an unbroken one.
    Every process of the engine's world has one and comes to the same verdict, since figures are agreed upon; only the
    main one writes.

    Args:
        context: the pass's; its `health` sets the interval and what follows a breach.
        name: the pass.
        evaluate: step -> held-out figures, the same in every process.
        redraw: step -> those on other draws; called after `evaluate`. None if no figure depends on draws.
        held_out: the figure among them whose lowest value marks the best evaluation.
        limits: figure, of an evaluation or of a step -> its healthy range.

    Attributes:
        every: steps between two evaluations.
        best: (step, held-out figure on the fixed draw) of the best healthy evaluation; step -1 before the first.
    """

    def __init__(
        self,
        context: PassContext,
        *,
        name: str,
        evaluate: Callable[[int], Figures],
        held_out: str,
        limits: Mapping[str, Limit] | None = None,
        redraw: Callable[[int], Redraws] | None = None,
    ) -> None:
        self._context, self._name, self.evaluate, self._held_out = context, name, evaluate, held_out
        self.redraw = redraw or (lambda step: NO_REDRAWS)
        self.every = context.health.every
        self.best = (-1, math.inf)
        self._best_redrawn: list[float] = []
        self._limits = dict(limits or {})
        self._beyond: set[str] = set()

    def resume(self, logged: Iterable[Figures]) -> None:
        """Restore the state after these lines of the log, which the main process passes; all processes together."""
        world = self._context.world
        if world.main:
            redraws = self._read_redraws()
            for record in logged:
                step = int(record["step"])
                self._new_breaches(step, record, redraws.get(step, NO_REDRAWS))
            HealthFile(**self._settings()).write(self._context.directory / HEALTH_FILE)
        state = world.broadcast(lambda: [self.best[0], _finite(self.best[1]), self._best_redrawn, sorted(self._beyond)])
        step, value, self._best_redrawn, beyond = state
        self.best, self._beyond = (step, math.inf if value is None else value), set(beyond)

    def _read_redraws(self) -> dict[int, Redraws]:
        """Read the redraws of each step from `redraws.jsonl`."""
        lines = RedrawsLine.read_lines(self._context.directory / REDRAWS_FILE)
        return {line.step: Redraws(line.draws, line.reference) for line in lines}

    def judge(self, step: int, figures: Figures, redraws: Redraws = NO_REDRAWS) -> bool:
        """Return True if training must roll back to its best evaluation and stop.

        Args:
            step: step of the training.
            figures: figures of this step, or of the held-out evaluation after it.
            redraws: the evaluation's figures on other draws.

        Raises:
            TrainingError: a figure breaches its limit and `on_breach` is stop, or there is nothing to roll back to.
        """
        action = self._context.health.on_breach
        for breach in self._new_breaches(step, figures, redraws):
            back = action == "rollback" and self.best[0] > 0
            line = f"{self._name}: step {step}: {breach.description}; see docs/health.md"
            self._record("rollback" if back else "stop" if action != "warn" else "warn", step, breach)
            if back:
                self._context.say(f"{line}; the pass ends with the weights of step {self.best[0]}, the best evaluation")
                return True
            if action == "rollback":
                raise TrainingError(f"{line}; stopped: no evaluation was better than the start")
            if action == "stop":
                raise TrainingError(f"{line}; stopped, the last good checkpoint is kept")
            self._context.say(f"warning: {line}")
        return False

    def _new_breaches(self, step: int, figures: Figures, redraws: Redraws) -> list[_Breach]:
        """Update the state by these figures; return those that now breach their limits and did not before.

        Step 0 has none: what a pass starts from is not its doing.
        """
        breaches = [self._breach(figure, value, redraws) for figure, value in figures.items()] if step > 0 else []
        beyond = {breach.figure: breach for breach in breaches if breach is not None}
        fresh = [breach for figure, breach in beyond.items() if figure not in self._beyond]
        self._beyond = (self._beyond - figures.keys()) | beyond.keys()
        if not beyond and self._held_out in figures:
            value, redrawn = figures[self._held_out], redraws.values(self._held_out)
            mean = fmean([value, *redrawn])
            # An evaluation from before redraws existed cannot be compared with later ones.
            older = len(redrawn) > len(self._best_redrawn)
            if math.isfinite(mean) and (older or mean < fmean([self.best[1], *self._best_redrawn])):
                self.best, self._best_redrawn = (step, value), redrawn
        return fresh

    def _breach(self, figure: str, value: float, redraws: Redraws) -> _Breach | None:
        """Return a breach if the value and every redraw are beyond the limit: else another draw would be healthy."""
        redrawn, reference = redraws.values(figure), redraws.reference_values(figure)
        limit = self._limit(figure, self.best[1], reference)
        if limit is None or limit.holds(value):
            return None
        breach = _Breach(figure=figure, value=value, limit=limit, redrawn=redrawn)
        if not math.isfinite(value):
            return breach
        limits: list[Limit | None] = [limit] * len(redrawn)
        if figure == self._held_out:
            limits = [self._limit(figure, best, reference) for best in self._best_redrawn]
            if len(limits) != len(redrawn):
                return None
        healthy = any(limit is None or limit.holds(other) for limit, other in zip(limits, redrawn, strict=True))
        return None if healthy else breach

    def _limit(self, figure: str, best: float, reference: Sequence[float]) -> Limit | None:
        """Return the healthy range of a figure, or None if it has no limit.

        Args:
            figure: its name.
            best: the held-out figure on the same draw at the best evaluation.
            reference: the figure of the reference on other draws.
        """
        health = self._context.health
        if figure == self._held_out and health.max_worsening is not None and math.isfinite(best):
            return Limit(
                setting="max_worsening",
                high=highest(best, health.max_worsening, fmean(reference) if reference else 0.0),
                fix=f"the best evaluation, step {self.best[0]}, had {best:.4g}: train for fewer steps, or lower "
                "learning_rate",
            )
        if figure.endswith(GRAD_NORM) and health.max_grad_norm is not None:
            return Limit(setting="max_grad_norm", high=health.max_grad_norm)
        limit = self._limits.get(figure)
        return limit.widen(reference) if limit is not None else None

    def _settings(self) -> dict[str, Any]:
        limits = {
            figure: {"setting": limit.setting, "low": limit.low, "high": limit.high, "mend": limit.fix}
            for figure, limit in self._limits.items()
            if (limit.low, limit.high) != (None, None)
        }
        return {"held_out": self._held_out, "limits": limits, **self._context.health.model_dump(mode="json")}

    def _record(self, action: str, step: int, breach: _Breach) -> None:
        if not self._context.world.main:
            return
        record = {
            "step": step,
            "figure": breach.figure,
            "value": _finite(breach.value),
            "redrawn": [_finite(value) for value in breach.redrawn],
            "low": breach.limit.low,
            "high": breach.limit.high,
            "setting": breach.limit.setting,
            "mend": breach.limit.fix,
            "action": action,
            "best_step": self.best[0],
        }
        append_line(self._context.directory / BREACHES_FILE, BreachLine(**record).line())
        self._context.note("health", self._name, status=action, **record)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
