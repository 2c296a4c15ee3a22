from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.core.registry import find_exporter, find_pass, find_step, known_passes
from flcompress.errors import RecipeError
from tests.fixtures.fakes import Cut, Score, Text

pytestmark = pytest.mark.usefixtures("fake_steps")


def install(folder: Path, group: str, lines: str) -> None:
    """What pip leaves of an installed package with these entry points."""
    info = folder / "third_party-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")


def test_a_pass_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flcompress.passes", "theirs = tests.fixtures.fakes:Score")
    monkeypatch.syspath_prepend(tmp_path)
    assert known_passes()["theirs"] == "tests.fixtures.fakes:Score"
    assert find_pass("theirs") is Score


def test_a_taken_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flcompress.passes", "cut = tests.fixtures.fakes:Score")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError) as caught:
        known_passes()
    assert str(caught.value) == (
        "entry point flcompress.passes: 'cut' is given as tests.fixtures.fakes:Score, but that name is taken by "
        "tests.fixtures.fakes:Cut; rename it in the package that declares it"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("odd = tests.fixtures.fakes:Text", "pass 'odd': .*Text.* is not a subclass of .*Pass"),
        ("odd = tests.fixtures.fakes:Nothing", "pass 'odd': tests.fixtures.fakes:Nothing cannot be imported"),
        ("odd = no_such_module:Nothing", "cannot be imported .No module named 'no_such_module'"),
    ],
)
def test_entry_points_that_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    install(tmp_path, "flcompress.passes", line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=message):
        find_pass("odd")


def test_finding_either() -> None:
    assert find_step("cut") is Cut
    assert find_step("text") is find_exporter("text") is Text
    with pytest.raises(RecipeError, match="no pass or exporter 'tex'; did you mean 'text'"):
        find_step("tex")
