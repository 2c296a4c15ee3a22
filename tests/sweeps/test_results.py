"""The table of a sweep: intervals over training seeds, paired differences, and the set that nothing dominates."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flcompress.core.records import BenchFile, CellResult, ContenderRow, Measured, SweepFile
from flcompress.core.settings import Evaluation
from flcompress.reporting.sweep_page import sweep_table, write_sweep_page
from flcompress.stats import interval
from flcompress.sweeps.request import Cell, Request
from flcompress.sweeps.results import Outcome, samples, summary

TEACHER = ContenderRow(
    name="teacher-50", label="teacher, 50 steps, guided", steps=50, guidance=4.0, evaluations=100, parameters=1000,
    frechet=Measured(mean=5.0, low=4.0, high=6.0, values=[4.5, 5.5]),
)  # fmt: skip


def result(frechet: list[float], *, evaluations: int = 4, parameters: int = 700, average: float = 0.9) -> CellResult:
    figures = {"frechet": frechet, "average": [average] * len(frechet)}
    return CellResult(
        key="k", steps=evaluations, evaluations=evaluations, parameters=parameters, calls=100.0, seconds=2.0,
        figures=figures,
    )  # fmt: skip


def request(*names: str, seeds: int = 2) -> Request:
    cells = tuple(Cell(name=name, recipe=Path("r.yaml"), settings={"a": name}) for name in names)
    return Request(
        name="s", source=Path("s.yaml"), cells=cells, seeds=seeds, evaluation=Evaluation(), axes={"a": list(names)}
    )


def sweep(**outcomes: Outcome) -> SweepFile:
    seeds = max(len(outcome.results) for outcome in outcomes.values())
    return summary(request(*outcomes, seeds=seeds), [TEACHER], outcomes)


def test_clips_of_one_training_are_one_sample() -> None:
    pair = [result([1.0, 3.0]), result([5.0, 7.0])]
    assert samples(pair, "frechet") == [2.0, 6.0]
    assert samples(pair[:1], "frechet") == [1.0, 3.0]


def test_differences_are_paired_by_training_seed() -> None:
    base = Outcome(results=[result([1.0, 3.0]), result([5.0, 7.0])])
    other = Outcome(results=[result([2.0, 4.0]), result([6.5, 8.5])])
    first, second = sweep(base=base, other=other).cells
    expected = interval([1.0, 1.5])
    measured = second.against_base["frechet"]
    assert (measured.mean, measured.low, measured.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert measured.values == [1.0, 1.5]
    assert not first.against_base
    assert first.figures["frechet"].values == [2.0, 6.0]


def test_work_and_the_way_it_is_saved() -> None:
    cells = sweep(
        joint=Outcome(results=[result([1.0, 2.0])]),
        steps=Outcome(results=[result([1.0, 2.0], parameters=1000)]),
        size=Outcome(results=[result([1.0, 2.0], evaluations=100)]),
    ).cells
    assert [cell.front for cell in cells] == ["joint", "steps", "size"]
    assert [cell.work_ratio for cell in cells] == pytest.approx([100 * 1000 / (4 * 700), 25.0, 1000 / 700])


costs = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=8)


@given(costs)
def test_the_best_are_exactly_those_that_no_other_dominates(rows: list[tuple[int, int, int]]) -> None:
    outcomes = {
        f"c{index}": Outcome(results=[result([frechet, frechet + 1.0], evaluations=steps, parameters=100 * size)])
        for index, (steps, size, frechet) in enumerate(rows)
    }
    cells = sweep(**outcomes).cells
    for cell, (steps, size, frechet) in zip(cells, rows, strict=True):
        dominated = any(
            s * z <= steps * size and f <= frechet and (s * z < steps * size or f < frechet) for s, z, f in rows
        )
        assert ("frechet" in cell.best_of) == (not dominated)


def test_a_failed_cell_is_listed_and_a_failed_base_leaves_no_differences(tmp_path: Path) -> None:
    results = sweep(base=Outcome(failed="out of memory (log)"), other=Outcome(results=[result([1.0, 2.0])]))
    failed, other = results.cells
    assert failed.failed == "out of memory (log)"
    assert not other.against_base
    assert any("failed" in line for line in sweep_table(results))
    write_sweep_page(results, tmp_path / "report.html")
    assert "out of memory (log)" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_table_and_page_show_every_cell_with_its_difference(tmp_path: Path) -> None:
    results = sweep(
        base=Outcome(results=[result([1.0, 3.0]), result([5.0, 7.0])], bench=bench()),
        other=Outcome(results=[result([2.0, 4.0]), result([6.5, 8.5])]),
    )
    lines = sweep_table(results)
    assert len(lines) == 4
    assert "(+1.25" in lines[3]
    assert "35.71x" in lines[2]
    file = tmp_path / "report.html"
    write_sweep_page(results, file)
    page = file.read_text(encoding="utf-8")
    assert page.count("<svg") == 4  # two figures, against work and against time
    for text in ("teacher, 50 steps, guided", "35.71x", "12.00x", "other"):
        assert text in page
    assert SweepFile.parse(*_written(results, tmp_path)) == results


def _written(results: SweepFile, folder: Path) -> tuple[str, object, str]:
    import json

    results.write(folder / "results.json")
    text = (folder / "results.json").read_text(encoding="utf-8")
    return text, json.loads(text), "results.json"


def bench() -> BenchFile:
    spread = {"median": 12.0, "low": 11.0, "high": 13.0}
    row = {"backend": "torch eager", "what": "denoising", "teacher_seconds": spread, "student_seconds": spread,
           "ratio": spread}  # fmt: skip
    return BenchFile.model_validate({"batch": 1, "rounds": 3, "work_ratio": 35.7, "rows": [row]})
