"""A blind comparison of teacher and student by a person: a page of pairs without names, and what its votes say."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from flcompress.core.records import BlindFile, BlindPair, ClipLine, ContenderRow, EvalFile, VotesFile
from flcompress.errors import RequestError
from flcompress.files import write_text
from flcompress.reporting.html import render_page
from flcompress.reporting.reading import RunRecord, read_run
from flcompress.stats import Interval, proportion

PAIRS = 20
"""Most pairs of a page: the first clip of prompts evenly spread over the list."""

LARGEST = 96 << 20
"""Most bytes of clips in a page; where they are larger, it has fewer pairs."""

ORDER = "eval/blind.json"
"""Where the run keeps which side is whose; the page does not have it."""


@dataclass(frozen=True, kw_only=True)
class Preference:
    """What the votes of a page say.

    Attributes:
        student: votes for the student.
        teacher: votes for the teacher.
        same: pairs that were called alike, which the share leaves out.
        open: pairs without a vote.
        share: of votes for the student, with the exact 95 % binomial interval; None without such votes.
        teacher_label: the teacher's name for readers.
    """

    student: int
    teacher: int
    same: int
    open: int
    share: Interval | None
    teacher_label: str

    @property
    def text(self) -> str:
        """One line for the terminal."""
        counts = f"student {self.student}, {self.teacher_label} {self.teacher}, no difference {self.same}"
        counts += f", without a vote {self.open}" if self.open else ""
        if self.share is None:
            return f"{counts}: no preference can be told"
        share = self.share
        preferred = "student" if share.mean > 0.5 else "teacher"
        verdict = "may be chance" if share.holds(0.5) else f"the {preferred} is preferred"
        return (
            f"{counts}: {share.mean:.0%} for the student (exact binomial 95 % interval {share.low:.0%} to "
            f"{share.high:.0%}): {verdict}"
        )


def write_blind(run_dir: Path) -> Path:
    """Write `RUN/blind.html` and return its path; `RUN/eval/blind.json` keeps which side is whose.

    Raises:
        RequestError: no evaluation of this student has clips of it and of its teacher.
        RecordError: a file of the run is damaged.
    """
    run = read_run(run_dir)
    results, teacher, student = _contenders(run)
    files = _first_clips(run, teacher, student)
    if not files:
        raise RequestError(
            f"{run_dir}: clips of {teacher.folder} and {student.folder} are gone; make them again with flcompress eval"
        )
    chosen = _spread(files, PAIRS)
    while len(chosen) > 1 and sum(file.stat().st_size for pair in chosen for file in pair[1:]) > LARGEST:
        chosen = _spread(files, len(chosen) - 1)
    pairs = [
        BlindPair(
            pair=_digest(results.program, line.file, "pair"),
            file=line.file,
            prompt=line.prompt,
            student="left" if int(_digest(results.program, line.file, "side"), 16) % 2 else "right",
        )
        for line, _, _ in chosen
    ]
    paths = {pair.pair: clips for pair, (_, *clips) in zip(pairs, chosen, strict=True)}
    pairs.sort(key=lambda pair: pair.pair)
    page = _digest(*(pair.pair for pair in pairs))
    order = BlindFile(
        page=page, program=results.program or "", suite=results.benchmark, teacher=teacher.label, pairs=pairs
    )
    order.write(run_dir / ORDER)
    shown = [
        {"id": pair.pair, "prompt": pair.prompt, "clips": [_address(path) for path in _sides(pair, paths[pair.pair])]}
        for pair in pairs
    ]
    target = run_dir / "blind.html"
    write_text(target, render_page("blind.html.j2", page=page, name=run.info.name or run_dir.name, pairs=shown))
    return target


def read_preference(run_dir: Path, votes: Path) -> Preference:
    """Return what a file of votes says, as the page of `write_blind` exports it.

    Raises:
        RequestError: no page was made, or the votes are of another one, or the file is none of votes.
    """
    if not (run_dir / ORDER).is_file():
        raise RequestError(f"{run_dir}: has no page to vote on; make it with flcompress report {run_dir} --blind")
    order = BlindFile.read(run_dir / ORDER)
    cast = VotesFile.read_named(votes, "give the file that the page exported", "export the votes of the page again")
    if cast.page != order.page:
        raise RequestError(
            f"{votes}: votes of page {cast.page} given, expected those of {order.page}, which is {run_dir}/blind.html"
        )
    sides = {pair.pair: pair.student for pair in order.pairs}
    unknown = sorted(set(cast.votes) - set(sides))
    if unknown:
        raise RequestError(f"{votes}: votes.{unknown[0]}: no such pair; export the votes of the page again")
    for pair, vote in cast.votes.items():
        if vote not in ("left", "right", "same"):
            raise RequestError(f"{votes}: votes.{pair}: {vote!r} given, expected left, right or same")
    decided = [vote == sides[pair] for pair, vote in cast.votes.items() if vote != "same"]
    student, teacher = sum(decided), len(decided) - sum(decided)
    return Preference(
        student=student,
        teacher=teacher,
        same=len(cast.votes) - len(decided),
        open=len(sides) - len(cast.votes),
        share=proportion(student, len(decided)) if decided else None,
        teacher_label=order.teacher,
    )


def _contenders(run: RunRecord) -> tuple[EvalFile, ContenderRow, ContenderRow]:
    """Return the first results with clip files of teacher and student."""
    for results in run.suites.values():
        rows = {row.name: row for row in results.contenders if row.folder is not None}
        teacher, student = results.contenders[0], rows.get("student")
        if student is not None and teacher.folder is not None and teacher is not student:
            return results, teacher, student
    raise RequestError(
        f"{run.path}: no evaluation has clips of this student and its teacher; make them with flcompress eval "
        f"{run.path} --suite proxies"
    )


def _first_clips(run: RunRecord, teacher: ContenderRow, student: ContenderRow) -> list[tuple[ClipLine, Path, Path]]:
    """Return the first clip of each prompt that both have: its line, the student's file, the teacher's."""
    folders = [run.path / str(row.folder) for row in (student, teacher)]
    found: dict[str, tuple[ClipLine, Path, Path]] = {}
    for manifest in sorted(folders[0].glob("manifest-*.jsonl")):
        for line in ClipLine.read_lines(manifest):
            files = [folder / line.file for folder in folders]
            first = found.get(line.item)
            earlier = first is None or (line.seed, line.number) < (first[0].seed, first[0].number)
            if earlier and all(file.is_file() for file in files):
                found[line.item] = (line, files[0], files[1])
    return list(found.values())


def _spread(files: list[tuple[ClipLine, Path, Path]], count: int) -> list[tuple[ClipLine, Path, Path]]:
    count = min(count, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def _sides(pair: BlindPair, clips: list[Path]) -> list[Path]:
    """Return the files of a pair, left and right, of (student's, teacher's)."""
    return clips if pair.student == "left" else clips[::-1]


def _digest(*parts: str | None) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def _address(file: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
