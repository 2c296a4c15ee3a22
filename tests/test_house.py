"""The house rules: how large a room and a module may be; documentation links and the names of the door hold."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import flcompress
import flcompress.api

ROOT = Path(__file__).parents[1]
MAX_MODULES = 15
MAX_LINES = 400
MIN_LINES = 40

SHORT = {
    "flcompress/__main__.py": "what `python -m flcompress` runs",
    "flcompress/core/wandb_access.py": "checked before any work, below the trackers that write",
    "flcompress/training/engines/choice.py": "names every engine, so no engine can hold it",
}
"""Modules of under `MIN_LINES` that no neighbour could hold, each with its reason."""

PACKAGES = ("flcompress", "passes", "exporters")
"""`flcompress/passes` and `flcompress/exporters` are links to the folders at the top, which `rglob` does not follow."""

MODULES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def name(path: Path) -> str:
    """The path from the top of the repository."""
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    """How many lines a file has."""
    return path.read_text(encoding="utf-8").count("\n")


def test_no_folder_has_too_many_modules() -> None:
    rooms = {
        folder: [path for path in MODULES if path.parent == folder] for folder in {path.parent for path in MODULES}
    }
    assert {name(folder): len(modules) for folder, modules in rooms.items() if len(modules) > MAX_MODULES} == {}


def test_no_module_is_too_long() -> None:
    assert {name(path): lines(path) for path in MODULES if lines(path) > MAX_LINES} == {}


def test_no_module_is_so_short_that_a_neighbour_could_hold_it() -> None:
    short = {name(path): lines(path) for path in MODULES if lines(path) < MIN_LINES}
    assert {path: count for path, count in short.items() if path not in SHORT} == {}
    assert set(SHORT) <= set(short), "SHORT lists modules that are gone or grown"


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links and pictures to files of the repository; code is not read."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield unquote(target)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and MkDocs make of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.replace("`", "")).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        file, _, anchor = target.partition("#")
        to = (page.parent / file).resolve() if file else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            broken.append(target)
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.is_relative_to(ROOT / "docs")]
    assert [page for page in pages if page not in navigation] == []


def undocumented(door: ModuleType) -> Iterator[str]:
    """Names that a public module opens, and their public members, without a docstring of their own."""
    for public in door.__all__:
        opened = getattr(door, public)
        if not (inspect.isclass(opened) or inspect.isroutine(opened)):
            continue  # a type alias
        if not opened.__doc__:
            yield public
        if inspect.isclass(opened):
            fields = inspect.get_annotations(opened)  # a field's default may be a function
            members = {key: value for key, value in vars(opened).items() if key not in fields}
            for key, value in members.items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if not key.startswith(("_", "model_")) and inspect.isroutine(function) and not function.__doc__:
                    yield f"{public}.{key}"


@pytest.mark.parametrize("door", [flcompress, flcompress.api], ids=lambda door: door.__name__)
def test_everything_public_has_a_docstring(door: ModuleType) -> None:
    assert list(undocumented(door)) == []
