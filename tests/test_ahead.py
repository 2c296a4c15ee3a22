"""Values that a thread computes ahead: order, how far, errors, and the end of the thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from flcompress.ahead import DEPTH, ahead

PATIENCE = 300.0


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_the_next_value_is_computed_while_one_is_used() -> None:
    reached = [threading.Event() for _ in range(4)]

    def numbers() -> Iterator[int]:
        for number, event in enumerate(reached):
            event.set()
            yield number

    used = []
    with ahead(numbers()) as values:
        for value in values:
            used.append(value)
            assert value + 1 == len(reached) or reached[value + 1].wait(PATIENCE)
            assert not any(event.is_set() for event in reached[value + 1 + DEPTH :])
    assert used == [0, 1, 2, 3]
    assert threads() == []


def test_an_error_appears_where_its_value_would() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        yield 1
        raise OSError("two")

    with ahead(numbers()) as values:
        assert [next(values), next(values)] == [0, 1]
        with pytest.raises(OSError, match="two"):
            next(values)
    assert threads() == []


def test_the_thread_ends_with_what_uses_the_values() -> None:
    computed = []

    def use() -> None:
        with ahead(numbers()) as values:
            for value in values:
                if value == 2:
                    raise KeyboardInterrupt

    def numbers() -> Iterator[int]:
        for number in range(100):
            computed.append(number)
            yield number

    with pytest.raises(KeyboardInterrupt):
        use()
    assert threads() == []
    assert len(computed) <= 3 + DEPTH
