"""Evaluation suites by name, and what the moving-digits one refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from flcompress.core.registry import SUITES, find_suite, known_suites
from flcompress.core.suites import Suite, SuiteRequest
from flcompress.errors import RecipeError, RequestError
from flcompress.progress import QuietDisplay
from tests.core.test_registry import install


@pytest.mark.parametrize("name", SUITES)
def test_built_in_suites_have_their_names(name: str) -> None:
    assert find_suite(name).name == name


def test_a_suite_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flcompress.suites", "theirs = flcompress.evaluation.comparison:MovingDigits")
    monkeypatch.syspath_prepend(tmp_path)
    assert known_suites()["theirs"] == "flcompress.evaluation.comparison:MovingDigits"
    assert issubclass(find_suite("theirs"), Suite)


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="no suite 'moving-digit'; did you mean 'moving-digits'"):
        find_suite("moving-digit")


def test_what_is_no_suite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "flcompress.suites", "odd = tests.fixtures.fakes:Text")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match=r"suite 'odd': .* is not a subclass of flcompress\.core\.suites\.Suite"):
        find_suite("odd")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": Path("mine.txt")}, "--prompts: mine.txt given, but the suite moving-digits has prompts and"),
        ({"images": Path("frames")}, "--images: frames given, but the suite moving-digits"),
        ({"against": (Path("other"),)}, "--against: other given, but the suite moving-digits"),
        ({"dry_run": True}, "--dry-run: given, but the suite moving-digits .*give --suite proxies"),
    ],
)
def test_moving_digits_has_its_own_prompts_and_contenders(options: dict[str, object], message: str) -> None:
    request = SuiteRequest(run=Path("run"), display=QuietDisplay(), **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=message):
        find_suite("moving-digits")().evaluate(request)


@pytest.mark.parametrize("name", SUITES)
def test_an_option_of_another_suite_is_refused(name: str) -> None:
    request = SuiteRequest(run=Path("run"), display=QuietDisplay(), own={"colour": "blue"})
    with pytest.raises(
        RequestError, match=f"--colour: blue given, but the suite {name} does not read it; leave it out"
    ):
        find_suite(name)().run(request)
