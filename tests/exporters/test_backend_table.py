from __future__ import annotations

from docs.measurements.backend_table import PAGE, page, table


def test_the_page_has_the_table_of_what_was_run() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")
    assert table() in page(), "python -m docs.measurements.backend_table"
