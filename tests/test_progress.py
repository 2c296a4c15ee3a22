"""The time left in plain lines."""

from __future__ import annotations

import pytest

from flcompress.progress import LineDisplay


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        # What is done before the first report, in whatever time, is not the speed of the rest.
        ([(100, 32), (140, 64)], ["32/256", "64/256, 0.8/s, 4:00 left"]),
        # A resumed work does not start at 0.
        ([(1, 200), (41, 208)], ["208/256, 0.2/s, 4:00 left"]),
    ],
)  # fmt: skip
def test_the_time_left_follows_from_what_was_seen(
    reports: list[tuple[int, int]],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter([0.0, *(now for now, _ in reports)])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with LineDisplay().stage("scores") as sink:
        for _, done in reports:
            sink(done, 256, {})
    assert [line.removeprefix("  scores: ") for line in capsys.readouterr().err.splitlines()] == expected
