"""The page that `flcompress report RUN` writes: one file, nothing fetched."""

from __future__ import annotations

import base64
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flcompress import wording
from flcompress.files import write_text
from flcompress.reporting import drawing, plots
from flcompress.reporting.findings import Blocks, blocks, headline
from flcompress.reporting.quality import Quality, quality
from flcompress.reporting.reading import RunRecord, read_run
from flcompress.reporting.speed import speed
from flcompress.reporting.stages import AGAINST_PLAN, AGAINST_PLAN_NOTE, exports, flatten, steps
from flcompress.reporting.suites import suite_part
from flcompress.reporting.training import Training, trainings

WIDE_ROW, NARROW_ROW = 16, 6
"""Most blocks in a row of the graph on a desk and on a phone."""

LONGEST_JOURNAL = 200


def write_report(run_dir: Path) -> Path:
    """Write `RUN/report.html` and return its path; what was there stays whole until the new one is complete.

    Raises:
        RequestError: `run_dir` is no run directory.
        RecordError: a file in it is damaged.
        OSError: the disk is full, or `run_dir` may not be written.
    """
    page = render(read_run(run_dir))
    target = run_dir / "report.html"
    write_text(target, page)
    return target


def render_page(template: str, **values: Any) -> str:
    """Return a page of this package's style and number formats as text."""
    environment = Environment(
        loader=PackageLoader("flcompress.reporting", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (wording.count, wording.size, wording.duration, wording.number, wording.share, wording.ratio,
                    wording.moment, wording.bounds, wording.in_brackets, wording.elapsed):  # fmt: skip
        environment.filters[filter_.__name__] = filter_
    style, _, _ = environment.loader.get_source(environment, "report.css")  # type: ignore[union-attr]
    return environment.get_template(template).render(style=Markup(style), **values)


def render(run: RunRecord) -> str:
    """Return the page as text."""
    fates, trained = blocks(run), trainings(run)
    measured = quality(run.evaluation) if run.evaluation is not None else None
    return render_page(
        "report.html.j2",
        run=run,
        name=run.info.name or run.path.name,
        top=headline(run),
        blocks=fates,
        pictures=_pictures(fates),
        training=[
            (entry, _curves(entry), [(label, _address(file)) for label, file in entry.strips]) for entry in trained
        ],
        quality=measured,
        suites=[suite_part(run, name, results) for name, results in run.suites.items()],
        strips=_strips(run, measured),
        comparison=_comparison(run),
        speed=speed(run.bench) if run.bench is not None else None,
        steps=steps(run),
        against_plan=AGAINST_PLAN,
        against_plan_note=AGAINST_PLAN_NOTE,
        exports=exports(run),
        certificate=_certificate(fates),
        journal=run.journal[-LONGEST_JOURNAL:],
        environment=_environment(run),
    )


def _pictures(fates: Blocks | None) -> dict[str, Markup]:
    """Return each drawing twice, for a desk and for a phone; the style sheet shows one."""
    if fates is None:
        return {}
    pictures = {
        "graph_wide": drawing.block_graph(fates, columns=WIDE_ROW),
        "graph_narrow": drawing.block_graph(fates, columns=NARROW_ROW),
    }
    if fates.scored:
        for name, draw in (("importance", plots.importance), ("levels", plots.levels)):
            pictures |= {f"{name}_wide": draw(fates), f"{name}_narrow": draw(fates, narrow=True)}
    if fates.attentive:
        pictures |= {
            "attention_wide": plots.attention(fates),
            "attention_narrow": plots.attention(fates, narrow=True),
        }
    return {name: Markup(picture) for name, picture in pictures.items() if picture}


def _curves(training: Training) -> list[Markup]:
    return [
        Markup(plots.curves(panel.title, panel.lines, f"{training.entry.name}-{n}", panel.bounds))
        for n, panel in enumerate(training.panels)
    ]


def _certificate(fates: Blocks | None) -> dict[str, str]:
    """Return the certificate of the cut; the table above it lists the blocks."""
    facts = flatten(fates.certificate) if fates is not None and fates.certificate is not None else {}
    return {key: value for key, value in facts.items() if value and key != "removed" and not key.startswith("kept.")}


def _strips(run: RunRecord, measured: Quality | None) -> list[tuple[str, str]]:
    """(label, data address): the picture that has all contenders, or else theirs, the teacher and the student first."""
    if measured is None:
        return []
    together = run.inside("eval/strips/comparison.png")
    if together is not None:
        return [("Teacher next to student, prompt by prompt", _address(together))]
    pictures: list[tuple[str, str]] = []
    named = [c for c in measured.contenders if c.strip]
    for contender in sorted(named, key=lambda c: ("teacher-50", "student").index(c.name) if c.name in (
        "teacher-50", "student") else 2):  # fmt: skip
        file = run.inside(contender.strip or "")
        if file is not None:
            pictures.append((contender.label, _address(file)))
    return pictures


def _comparison(run: RunRecord) -> str | None:
    file = run.inside("eval/comparison.gif") if run.evaluation is not None else None
    return _address(file) if file is not None else None


def _address(file: Path) -> str:
    kind = {".png": "image/png", ".gif": "image/gif"}.get(file.suffix.lower(), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _environment(run: RunRecord) -> dict[str, str]:
    """Return the source of the numbers, as far as the run's own files state it, and of this page."""
    known = {key.replace("_", " "): value for key, value in flatten(run.info.dump()).items() if key != "entries"}
    if run.bench is not None:
        known |= {f"bench {key}": value for key, value in flatten(run.bench.machine).items()}
    known["page written by"] = f"flcompress {_version()}, Python {platform.python_version()}"
    return known


def _version() -> str:
    try:
        return metadata.version("flcompress")
    except metadata.PackageNotFoundError:
        return "(not installed)"
