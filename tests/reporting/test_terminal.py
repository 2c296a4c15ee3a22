import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from flcompress.reporting.terminal import print_measured, print_summary
from tests.reporting.synthetic import write_run

GOLDEN = Path(__file__).parent / "golden"


def summary(run: Path, show: Callable[[Path, Console], None] = print_summary, width: int = 100) -> str:
    out = io.StringIO()
    show(run, Console(file=out, width=width, color_system=None))
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


@pytest.mark.parametrize(
    ("name", "passes", "measured"), [("whole", True, True), ("unmeasured", True, False), ("untouched", False, False)]
)
def test_the_summary_reads_as_agreed(
    name: str, passes: bool, measured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), passes=passes, measured=measured)
    assert summary(Path("run")) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "shown", "other"),
    [("eval", "Quality, with", "Speed: clips"), ("bench", "Speed: clips", "Quality, with")],
)
def test_a_measuring_command_prints_what_it_measured(
    command: Literal["eval", "bench"], shown: str, other: str, tmp_path: Path
) -> None:
    text = summary(write_run(tmp_path), partial(print_measured, command=command))
    assert shown in text
    assert all(absent not in text for absent in (other, "Removed blocks", "Passes and exports"))
    tables, _, pointer = text.partition("The whole run, and its page: ")
    assert set(tables.splitlines()) <= set(summary(tmp_path).splitlines())
    assert pointer.replace("\n", "") == f"flcompress report{tmp_path}"


def test_names_are_not_broken_on_a_narrow_terminal(tmp_path: Path) -> None:
    text = summary(write_run(tmp_path), width=40)
    rows = text[text.index("Passes and exports") :].splitlines()
    assert [row for row in rows if row.startswith(" stochastic-depth ")]


def test_it_says_which_command_measures_what_is_missing(tmp_path: Path) -> None:
    text = summary(write_run(tmp_path, measured=False)).replace("\n", " ")
    assert "quality: not measured; run flcompress eval" in text
    assert "speed: not measured; run flcompress bench" in text


def test_it_says_what_was_measured_on_an_earlier_student(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for command in ("eval", "bench"):
        file = run / command / "results.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "program": "f" * 64}))
    text = summary(run).replace("\n", " ")
    assert f"speed: measured on an earlier student; run flcompress bench {run} again" in text
    assert f"quality: measured on an earlier student; run flcompress eval {run} again" in text


def test_markup_in_a_name_is_printed_as_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path, measured=False)
    (run / "run.json").write_text(
        '{"name": "[red]odd[/red]", "recipe_path": "odd.yaml", "created": "", "entries": [], "finished": false}'
    )
    assert "[red]odd[/red]" in summary(run)
