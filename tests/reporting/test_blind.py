"""The blind page: pairs whose sides nobody can read, and what exported votes say."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from flcompress.cli import main
from flcompress.core.records import BlindFile, ClipLine, EvalFile, RunFile
from flcompress.errors import FlcompressError, RequestError
from flcompress.reporting import blind
from flcompress.reporting.blind import read_preference, write_blind
from flcompress.stats import proportion
from tests.reporting.synthetic import write_run

PROMPTS = 30


def write_clips(run: Path, *, suite: str = "proxies") -> None:
    """Results of a suite, with two clips of every prompt of teacher and student."""
    entry = json.loads((run / RunFile.read(run / "run.json").entries[-1] / "entry.json").read_text())
    rows = []
    for name in ("teacher-50", "student"):
        folder = run / "eval" / "clips" / f"{name}-0123"
        folder.mkdir(parents=True)
        lines = []
        for number in range(PROMPTS):
            for seed in (1, 0):
                file = f"p{number}-s{seed}-0.mp4"
                (folder / file).write_bytes(f"{name} {file}".encode())
                size = {"frames": 9, "height": 32, "width": 32, "frame_rate": 8.0}
                prompt = f"a <b>prompt</b> {number}"
                line = ClipLine(file=file, sha256="0", item=f"i{number}", prompt=prompt, seed=seed, number=0, **size)
                lines.append(line.line())
        (folder / "manifest-0.jsonl").write_text("\n".join(lines) + "\n")
        row = {"name": name, "label": f"{name}!", "steps": 4, "guidance": 1.0, "evaluations": 4, "parameters": 9}
        rows.append({**row, "folder": f"eval/clips/{name}-0123"})
    common = {"program": entry["key"], "benchmark": suite, "clips": 60, "seeds": 2, "prompts": PROMPTS, "floor": {}}
    (run / "eval" / suite).mkdir()
    EvalFile.model_validate({**common, "contenders": rows, "paired": []}).write(run / "eval" / suite / "results.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = write_run(tmp_path / "run", measured=False)
    write_clips(path)
    return path


def clips_of(page: str) -> dict[str, list[str]]:
    """Pair -> what its left and right clip hold."""
    found = {}
    for section in re.findall(r'<section class="pair-of-clips" data-pair="(\w+)"(.*?)</section>', page, re.DOTALL):
        addresses = re.findall(r'src="data:video/mp4;base64,([^"]*)"', section[1])
        found[section[0]] = [base64.b64decode(address).decode() for address in addresses]
    return found


def test_sides_are_random_and_the_page_does_not_say_them(run: Path) -> None:
    page = write_blind(run).read_text(encoding="utf-8")
    order = BlindFile.read(run / "eval" / "blind.json")
    shown = clips_of(page)
    assert list(shown) == [pair.pair for pair in order.pairs]
    assert len(shown) == blind.PAIRS
    for pair in order.pairs:
        sides = dict(zip(("left", "right"), shown[pair.pair], strict=True))
        assert sides[pair.student].startswith("student ")
        assert sorted(each.split()[0] for each in sides.values()) == ["student", "teacher-50"]
        assert {each.split()[1] for each in sides.values()} == {pair.file}
        assert pair.file.endswith("-s0-0.mp4"), "the first clip of a prompt"
    assert 4 <= sum(pair.student == "left" for pair in order.pairs) <= 16
    readable = re.sub(r"base64,[^\"]*|<style>.*?</style>", "", page, flags=re.DOTALL)
    assert "student" not in readable
    assert "teacher" not in readable
    assert "&lt;b&gt;" in readable
    assert not re.search(r"(src|href)=\"(?!data:)", readable)
    assert write_blind(run).read_text(encoding="utf-8") == page


def test_large_clips_make_a_page_of_fewer_pairs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blind, "LARGEST", 200)
    assert 0 < len(clips_of(write_blind(run).read_text())) < 8


def cast(run: Path, votes: dict[str, str], page: str | None = None) -> Path:
    order = BlindFile.read(run / "eval" / "blind.json")
    path = run / "votes.json"
    path.write_text(json.dumps({"page": page or order.page, "votes": votes}))
    return path


def test_votes_are_counted_for_the_model_behind_the_side(run: Path) -> None:
    write_blind(run)
    pairs = BlindFile.read(run / "eval" / "blind.json").pairs
    other = {"left": "right", "right": "left"}
    votes: dict[str, str] = {pair.pair: pair.student for pair in pairs[:12]}
    votes |= {pair.pair: other[pair.student] for pair in pairs[12:14]} | {pairs[14].pair: "same"}
    preference = read_preference(run, cast(run, votes))
    assert (preference.student, preference.teacher, preference.same, preference.open) == (12, 2, 1, 5)
    told = CliRunner().invoke(main, ["report", str(run), "--votes", str(run / "votes.json")])
    assert told.output == (
        "student 12, teacher-50! 2, no difference 1, without a vote 5: 86% for the student (exact binomial 95 % "
        "interval 57% to 98%): the student is preferred\n"
    )
    even = {pair.pair: "left" for pair in pairs}
    assert "may be chance" in read_preference(run, cast(run, even)).text
    assert read_preference(run, cast(run, {pairs[0].pair: "same"})).text.endswith("no preference can be told")


@pytest.mark.parametrize(
    ("votes", "page", "message"),
    [
        ({}, "0123", "votes of page 0123 given, expected those of"),
        ({"nobody": "left"}, None, r"votes\.nobody: no such pair"),
    ],
)
def test_votes_that_fit_no_page_are_one_line(run: Path, votes: dict[str, str], page: str | None, message: str) -> None:
    write_blind(run)
    with pytest.raises(FlcompressError, match=message):
        read_preference(run, cast(run, votes, page))
    pair = BlindFile.read(run / "eval" / "blind.json").pairs[0].pair
    with pytest.raises(RequestError, match=rf"votes\.{pair}: 'both' given, expected left, right or same"):
        read_preference(run, cast(run, {pair: "both"}))


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", measured=False)
    with pytest.raises(
        RequestError, match=r"no evaluation has clips of this student and its teacher; .*--suite proxies"
    ):
        write_blind(run)
    with pytest.raises(RequestError, match=r"has no page to vote on; make it with flcompress report .* --blind"):
        read_preference(run, tmp_path / "votes.json")
    write_clips(run)
    write_blind(run)
    with pytest.raises(RequestError, match=r"no\.json: no such file; give the file that the page exported"):
        read_preference(run, tmp_path / "no.json")
    told = CliRunner().invoke(main, ["report", str(run), "--blind", "--votes", "x.json"])
    assert told.exit_code == 2
    for file in (run / "eval" / "clips").glob("student-*/*.mp4"):
        file.unlink()
    with pytest.raises(RequestError, match="are gone; make them again with flcompress eval"):
        write_blind(run)


def test_the_exact_binomial_interval() -> None:
    """Of 8 in 10, and of all in 10, as tables have them."""
    assert proportion(8, 10).low == pytest.approx(0.4439, abs=1e-4)
    assert proportion(8, 10).high == pytest.approx(0.9748, abs=1e-4)
    assert proportion(10, 10).high == 1.0
    assert proportion(10, 10).low == pytest.approx(0.025**0.1)
    with pytest.raises(RequestError, match="proportion: 0 of 0 given"):
        proportion(0, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_both_sides_of_a_vote_have_mirrored_intervals(votes: tuple[int, int]) -> None:
    ours, theirs = proportion(*votes), proportion(votes[1] - votes[0], votes[1])
    assert 0.0 <= ours.low <= ours.mean <= ours.high <= 1.0
    assert ours.low == pytest.approx(1.0 - theirs.high)
    assert ours.high == pytest.approx(1.0 - theirs.low)
