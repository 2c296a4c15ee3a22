"""Judges a training by its figures: warns, stops it, or sends it back to its best look. See docs/health.md."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from flcompress.core.settings import highest
from flcompress.core.steps import PassContext
from flcompress.errors import TrainingError
from flcompress.files import append_line, write_text

HEALTH_FILE, BREACHES_FILE, REDRAWS_FILE = "health.json", "breaches.jsonl", "redraws.jsonl"
"""The limits, one object for each breach of them, and one for each look's figures on other draws: what the report shows
beside `metrics.jsonl`.
"""

REDRAWS = 8
"""Other draws on which a look repeats its figures.

A figure that luck alone puts beyond its limit on half of all draws is beyond it on all of these in one look of 256;
tests/training/watching/test_redraws.py has the rates of whole trainings.
"""

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Redraws:
    """The figures of a look on other draws, always the same ones.

    Attributes:
        draws: of the weights that are looked at.
        reference: of what they are compared with, such as the teacher; empty where there is none.
    """

    draws: Sequence[Figures] = ()
    reference: Sequence[Figures] = ()

    def of(self, figure: str) -> list[float]:
        """A figure on each of the draws."""
        return [one[figure] for one in self.draws if figure in one]

    def of_reference(self, figure: str) -> list[float]:
        """The same of the reference."""
        return [one[figure] for one in self.reference if figure in one]


NONE = Redraws()

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

    def widened(self, values: Sequence[float]) -> Limit:
        """The same, but healthy for these values too."""
        low = self.low if self.low is None else min([self.low, *values])
        high = self.high if self.high is None else max([self.high, *values])
        return replace(self, low=low, high=high)

    def _above(self, value: float) -> bool:
        return self.high is not None and value > self.high

    def told(self, figure: str, value: float, redrawn: Sequence[float] = ()) -> str:
        """The breach in words; with the range of the same figure on other draws, where there are some."""
        high = self.low is None or self._above(value)
        expected = f"at most {self.high:.4g}" if high else f"at least {self.low:.4g}"
        others = f" ({min(redrawn):.4g} to {max(redrawn):.4g} on {len(redrawn)} other draws)" if redrawn else ""
        return f"{figure} {value:.4g}{others}, expected {expected} (training.health.{self.setting}); {self.mend}"


@dataclass(frozen=True, kw_only=True)
class _Breach:
    """A figure beyond its limit, and what it is on other draws."""

    figure: str
    value: float
    limit: Limit
    redrawn: Sequence[float]

    @property
    def told(self) -> str:
        return self.limit.told(self.figure, self.value, self.redrawn)


class Watch:
    """Looks at one training again and again, and judges what it and the training itself report.

    The figures of a look come from few draws (noises, clips), so each has a spread. `again` gives them on other draws,
    the same ones at every look. A figure is beyond its limit where it is on every draw; a limit relative to the best
    look compares each draw with the same draw there, and the best look is the one with the lowest mean over all draws.
    No limit is narrower than what the reference itself has on other draws.

    Its state is a function of `metrics.jsonl` and `redraws.jsonl`, so a resumed training judges as an unbroken one.
    Every process of the work's world has one and comes to the same verdict, since figures are agreed upon; only the
    main one writes.

    Args:
        work: of the pass; its `health` says how often to look and what follows a breach.
        name: of the pass.
        look: step -> held-out figures, the same in every process.
        again: step -> those on other draws; called after `look`. None where a figure is no estimate.
        held_out: the figure among them whose lowest value marks the best look.
        limits: figure, of a look or of a step -> what is healthy.

    Attributes:
        every: steps between two looks.
        best: (step, held-out figure on the fixed draw) of the best healthy look; step -1 before the first.
    """

    def __init__(
        self,
        work: PassContext,
        *,
        name: str,
        look: Callable[[int], Figures],
        held_out: str,
        limits: Mapping[str, Limit] | None = None,
        again: Callable[[int], Redraws] | None = None,
    ) -> None:
        self._work, self._name, self.look, self._held_out = work, name, look, held_out
        self.again = again or (lambda step: NONE)
        self.every = work.health.every
        self.best = (-1, math.inf)
        self._best_redrawn: list[float] = []
        self._limits = dict(limits or {})
        self._beyond: set[str] = set()

    def resume(self, logged: Iterable[Figures]) -> None:
        """Take up the state after these lines of the log, which the main process gives; all processes together."""
        world = self._work.world
        if world.main:
            again = self._redrawn()
            for record in logged:
                step = int(record["step"])
                self._judged(step, record, again.get(step, NONE))
            write_text(self._work.directory / HEALTH_FILE, json.dumps(self._settings(), indent=1) + "\n")
        state = world.broadcast(lambda: [self.best[0], _finite(self.best[1]), self._best_redrawn, sorted(self._beyond)])
        step, value, self._best_redrawn, beyond = state
        self.best, self._beyond = (step, math.inf if value is None else value), set(beyond)

    def _redrawn(self) -> dict[int, Redraws]:
        """Those of each step, as `redraws.jsonl` has them."""
        path = self._work.directory / REDRAWS_FILE
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        return {one["step"]: Redraws(one["draws"], one["reference"]) for one in map(json.loads, filter(None, lines))}

    def judge(self, step: int, figures: Figures, again: Redraws = NONE) -> bool:
        """Take in the figures of a step or a look; whether the training has to go back to its best look and end.

        Raises:
            TrainingError: a figure is beyond its limit and `on_breach` is stop, or there is no look to go back to.
        """
        action = self._work.health.on_breach
        for breach in self._judged(step, figures, again):
            back = action == "rollback" and self.best[0] > 0
            line = f"{self._name}: step {step}: {breach.told}; see docs/health.md"
            self._record("rollback" if back else "stop" if action != "warn" else "warn", step, breach)
            if back:
                self._work.say(f"{line}; the pass ends with the weights of step {self.best[0]}, the best look")
                return True
            if action == "rollback":
                raise TrainingError(f"{line}; stopped: no look was better than the start")
            if action == "stop":
                raise TrainingError(f"{line}; stopped, the last good checkpoint is kept")
            self._work.say(f"warning: {line}")
        return False

    def _judged(self, step: int, figures: Figures, again: Redraws) -> list[_Breach]:
        """The figures that have now gone beyond their limits. What a pass starts from is not its doing."""
        found = [self._breach(figure, value, again) for figure, value in figures.items()] if step > 0 else []
        beyond = {breach.figure: breach for breach in found if breach is not None}
        fresh = [breach for figure, breach in beyond.items() if figure not in self._beyond]
        self._beyond = (self._beyond - figures.keys()) | beyond.keys()
        if not beyond and self._held_out in figures:
            value, redrawn = figures[self._held_out], again.of(self._held_out)
            mean = fmean([value, *redrawn])
            # A look of a training that was begun before there were redraws cannot be compared with those of now.
            older = len(redrawn) > len(self._best_redrawn)
            if math.isfinite(mean) and (older or mean < fmean([self.best[1], *self._best_redrawn])):
                self.best, self._best_redrawn = (step, value), redrawn
        return fresh

    def _breach(self, figure: str, value: float, again: Redraws) -> _Breach | None:
        """One whose value is beyond its limit, and every redraw too: else another draw would say that all is well."""
        redrawn, reference = again.of(figure), again.of_reference(figure)
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
        luck = any(one is None or one.holds(other) for one, other in zip(limits, redrawn, strict=True))
        return None if luck else breach

    def _limit(self, figure: str, best: float, reference: Sequence[float]) -> Limit | None:
        """What is healthy of a figure.

        Args:
            figure: its name.
            best: the held-out figure on the same draw at the best look.
            reference: what the reference has of the figure on other draws.
        """
        health = self._work.health
        if figure == self._held_out and health.max_worsening is not None and math.isfinite(best):
            return Limit(
                setting="max_worsening",
                high=highest(best, health.max_worsening, fmean(reference) if reference else 0.0),
                mend=f"the best look, step {self.best[0]}, had {best:.4g}: train for fewer steps, or lower "
                "learning_rate",
            )
        if figure.endswith(GRAD_NORM) and health.max_grad_norm is not None:
            return Limit(setting="max_grad_norm", high=health.max_grad_norm)
        limit = self._limits.get(figure)
        return limit.widened(reference) if limit is not None else None

    def _settings(self) -> dict[str, Any]:
        limits = {figure: asdict(limit) for figure, limit in self._limits.items() if limit != _none(limit)}
        return {"held_out": self._held_out, "limits": limits, **self._work.health.model_dump(mode="json")}

    def _record(self, action: str, step: int, breach: _Breach) -> None:
        if not self._work.world.main:
            return
        told = {
            "step": step,
            "figure": breach.figure,
            "value": _finite(breach.value),
            "redrawn": [_finite(one) for one in breach.redrawn],
            "low": breach.limit.low,
            "high": breach.limit.high,
            "setting": breach.limit.setting,
            "mend": breach.limit.mend,
            "action": action,
            "best_step": self.best[0],
        }
        append_line(self._work.directory / BREACHES_FILE, json.dumps(told))
        self._work.note("health", self._name, status=action, **told)


def _none(limit: Limit) -> Limit:
    return Limit(setting=limit.setting, mend=limit.mend)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
