"""The house rules: how large a room and a module may be; documentation links and the names of the door hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
MAX_MODULES = 15
MAX_LINES = 400

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
