import json
from collections.abc import Callable
from pathlib import Path

import pytest

from flcompress import wording
from flcompress.errors import RecordError, RequestError
from flcompress.reporting.html import write_report
from flcompress.reporting.reading import read_run
from tests.reporting.synthetic import write_run


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="gone: no such folder, expected a run directory; flcompress apply RECIPE"):
        read_run(tmp_path / "gone")
    with pytest.raises(RequestError, match=r"has no run.json, expected a run directory; flcompress apply RECIPE"):
        read_run(tmp_path)


def _cut(file: Path) -> None:
    file.write_text(file.read_text()[:40])


def _without(key: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))

    return damage


def _levels(file: Path) -> None:
    value = json.loads(file.read_text())
    value["blocks"][2]["per_level"] = [[0, 1, "x", 2]]
    file.write_text(json.dumps(value))


def _lone(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "paired": []}))


def _middle(file: Path) -> None:
    file.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run.json", _cut, "run.json: cannot be read as JSON"),
        ("eval/results.json", _cut, "results.json: cannot be read as JSON"),
        ("eval/results.json", _without("contenders"), "contenders is nothing, expected a list of objects"),
        ("eval/results.json", _without("paired"), "results.json: paired is nothing, expected a list of objects"),
        ("eval/results.json", _lone, "paired has no frechet of teacher-4 and teacher-50; make the file again"),
        ("bench/results.json", _without("work_ratio"), "work_ratio is nothing, expected a number"),
        ("passes/*-importance-*/result.json", _levels, r"blocks\[2\].per_level is .*expected a list of rows of 4"),
        ("passes/*-prune-*/result.json", _without("kept"), "result.json: kept is nothing, expected an object"),
        ("passes/*-prune-*/graph.json", _cut, "graph.json: block graph is not JSON"),
        ("passes/*-dmd-*/program.json", _without("contract"), "program.json: contract is nothing, expected an object"),
        ("passes/*-dmd-*/metrics.jsonl", _middle, "metrics.jsonl: line 2 is not JSON"),
    ],
)
def test_a_damaged_file_is_named(name: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    damage(next(run.glob(name)))
    with pytest.raises(RecordError, match=message) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


def test_a_last_line_cut_in_half_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    metrics = next(run.glob("passes/*-dmd-*/metrics.jsonl"))
    whole = len(metrics.read_text().splitlines())
    metrics.write_text(metrics.read_text() + '{"step": 20')
    entry = read_run(run).entry("dmd")
    assert entry is not None
    assert len(entry.metrics()) == whole


def test_only_the_results_that_make_up_the_run_count(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    old = run / "passes" / "04-dmd-0ld"
    old.mkdir()
    (old / "entry.json").write_text('{"key": "0ld", "name": "dmd", "index": 4, "arguments": {}, "seconds": 1}')
    assert [entry.key for entry in read_run(run).entries] == [f"{index:064x}" for index in range(5)]


def test_what_was_measured_on_an_earlier_student_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    entry = next(run.glob("passes/*-dmd-*/entry.json"))
    entry.write_text(json.dumps({**json.loads(entry.read_text()), "key": "f" * 64}))  # as another recipe would have
    found = read_run(run)
    assert found.outdated == {"eval", "bench"}
    assert found.evaluation is None
    assert found.bench is None
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("was measured on an earlier student: the recipe has been changed and applied since.") == 2
    assert "The samples are of an earlier student." in page
    assert "data:image" not in page
    assert "33.00x" not in page


def test_what_does_not_say_its_student_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    _without("program")(run / "bench/results.json")
    found = read_run(run)
    assert found.outdated == {"bench"}
    assert found.evaluation is not None


def test_a_listed_result_that_is_gone_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    next(run.glob("passes/*-dmd-*/entry.json")).unlink()
    with pytest.raises(RecordError, match=r"04-dmd-000000000004/entry.json: cannot be read as JSON"):
        read_run(run)


def test_a_file_outside_the_run_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    run = read_run(write_run(tmp_path / "run"))
    assert run.inside("../secret.png") is None
    assert run.inside("eval/strips/student.png") is not None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (wording.count(1_234_567), "1.23 M"),
        (wording.count(999), "999"),
        (wording.count(999_700), "1 M"),
        (wording.count(14_300_000_000), "14.3 B"),
        (wording.flops(14_300_000_000), "14.3 G"),
        (wording.flops(7.21e15), "7.21 P"),
        (wording.size(15_300_000), "15.3 MB"),
        (wording.size(900), "900 B"),
        (wording.duration(0.064), "64 ms"),
        (wording.duration(59.97), "1 min 00 s"),
        (wording.duration(7300), "2 h 01 min"),
        (wording.number(0.00302), "0.00302"),
        (wording.number(0.91), "0.910"),
        (wording.number(1600), "1,600"),
        (wording.number(-0.00051), "-0.000510"),
        (wording.number(0), "0"),
        (wording.moment(0), "1970-01-01 00:00:00 UTC"),
    ],
)
def test_numbers_are_written_for_people(said: str, expected: str) -> None:
    assert said == expected
