import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from flcompress.core.records import EvalFile
from flcompress.reporting.html import write_report
from flcompress.reporting.quality import quality
from tests.reporting.synthetic import write_run

SECTIONS = (
    "headline", "quality", "samples", "speed", "graph", "importance", "removed", "training", "passes", "recipe",
    "journal", "environment",
)  # fmt: skip
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a whole run, drawn once; tests only read it."""
    return write_report(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def page(report: Path) -> str:
    return report.read_text(encoding="utf-8")


@pytest.mark.parametrize("blocks", [16, 60])
def test_every_section_is_there_and_linked(blocks: int, page: str, tmp_path: Path) -> None:
    if blocks != 16:
        page = write_report(write_run(tmp_path, blocks=blocks)).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert re.findall(r'<a href="#(\w+)"', page) == list(SECTIONS)
    assert page.count('class="block removed"') == 2 * round(0.3 * blocks)  # for a desk and for a phone
    assert "U-index 4.20." in page
    assert page.count("data:image/png;base64,") == 5
    assert page.count("data:image/gif;base64,") == 1
    assert 'class="todo"' not in page


def test_one_picture_of_all_contenders_stands_for_their_own(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "eval/strips/teacher-4.png").rename(run / "eval/strips/comparison.png")
    page = write_report(run).read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 1
    assert "Teacher next to student, prompt by prompt" in page


def test_nothing_is_fetched(page: str) -> None:
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "@import" not in page
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_the_best_and_those_not_known_to_be_worse_are_marked(page: str) -> None:
    assert '<span class="best">420</span>' in page
    assert '<span class="tied">431</span>' in page
    assert '<span class="">980</span>' in page
    assert '<td class="better">better</td>' in page
    assert '<td class="not told apart">not told apart</td>' in page


def speed_section(page: str) -> str:
    return page.partition('<section id="speed">')[2].partition("</section>")[0]


def test_speed_is_shown_with_its_size_precision_and_memory(page: str) -> None:
    section = speed_section(page)
    assert "clips of 9 x 32 x 32 pixels, batch 1." in section
    cells = {
        row[0]: row[1:]
        for row in re.findall(r'row">(.*?)<small>fp32</small></th><td>denoising</td><td class="n">(.*?)</td>', section)
    }
    assert [cells["torch eager"], cells["ONNX Runtime"]] == [("18 MB",), ("\N{EN DASH}",)]
    assert '<td class="n">18 MB</td><td class="n">9 MB</td>' in section


def test_a_bench_without_memory_and_size_is_shown_as_before(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    bench = json.loads((run / "bench" / "results.json").read_text())
    for row in bench["rows"]:
        del row["teacher_memory"], row["student_memory"]
    (run / "bench" / "results.json").write_text(json.dumps({k: v for k, v in bench.items() if k != "size"}))
    section = speed_section(write_report(run).read_text(encoding="utf-8"))
    assert "memory" not in section
    assert "5 rounds interleaved, batch 1." in section


def test_paired_differences_decide_where_intervals_overlap(tmp_path: Path) -> None:
    """0.900 and 0.910 are known to 0.012 each, their difference to less than its size."""
    run = write_run(tmp_path)
    found = {(c.other, c.metric): c for c in quality(EvalFile.read(run / "eval/results.json")).comparisons}
    accuracy = found["teacher, 50 steps, guided", "Prompt accuracy"]
    assert accuracy.student.high > accuracy.against.low
    assert accuracy.difference.mean == pytest.approx(-0.01)
    assert accuracy.verdict == "worse"
    assert found["teacher, 50 steps, guided", "Fréchet distance"].verdict == "not told apart"
    assert found["teacher, 4 steps", "Fréchet distance"].verdict == "better"
    assert found["teacher, 4 steps", "Fréchet distance"].difference.mean == pytest.approx(431 - 980)


def test_a_pair_is_read_from_both_sides(tmp_path: Path) -> None:
    file = write_run(tmp_path) / "eval/results.json"
    before = quality(EvalFile.read(file)).comparisons
    results = json.loads(file.read_text())
    for pair in results["paired"]:
        a, b, low, high = pair["a"], pair["b"], pair["low"], pair["high"]
        pair |= {"a": b, "b": a, "mean": -pair["mean"], "low": -high, "high": -low}
    file.write_text(json.dumps(results))
    assert quality(EvalFile.read(file)).comparisons == before


def test_odd_text_is_escaped(tmp_path: Path) -> None:
    run = write_run(tmp_path, measured=False)
    (run / "recipe.yaml").write_text("# </pre><script>alert('x')</script> & {{ 7 * 7 }}\n")
    metrics = next(run.glob("passes/*-dmd-*/metrics.jsonl"))
    metrics.write_text('{"step": 1, "<b>$x_loss": 0.5}\n{"step": 2, "<b>$x_loss": 0.4}\n')
    page = write_report(run).read_text(encoding="utf-8")
    assert "&lt;/pre&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; {{ 7 * 7 }}" in page
    assert "<script" not in page
    assert "<b>" not in page


def test_missing_parts_name_the_command_that_makes_them(tmp_path: Path) -> None:
    run = write_run(tmp_path, passes=False, measured=False)
    page = write_report(run).read_text(encoding="utf-8")
    for command in ("eval", "bench", "export"):
        assert f"<code>flcompress {command} {run}</code>" in page
    assert "No block was scored." in page
    assert "Nothing was removed." in page
    assert "No pass of this run has trained anything." in page


def test_the_same_run_gives_the_same_page(report: Path) -> None:
    before = report.read_bytes()
    assert write_report(report.parent).read_bytes() == before


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, measured=False)
    (run / "report.html").write_bytes(b"the old page")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report(run)
    assert (run / "report.html").read_bytes() == b"the old page"
    assert not list(run.glob("report.html?*"))


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it(width: int, report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},5000", f"--screenshot={picture}",
         report.as_uri()],
        check=True, capture_output=True, timeout=900,
    )  # fmt: skip
    with Image.open(picture) as shown:
        assert shown.width == width
        colours = {colour for _, colour in shown.convert("RGB").getcolors(1 << 24) or []}
    # The ground, a kept and a removed block's outline: the style sheet and the drawings took effect.
    assert {(0xFA, 0xFA, 0xF8), (0x1C, 0x6A, 0x87), (0xB9, 0x57, 0x2A)} <= colours
