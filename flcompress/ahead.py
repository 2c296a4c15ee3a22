"""Values that a thread computes while those before them are used: videos before an encoder, batches before a step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Value = TypeVar("_Value")

DEPTH = 1
"""Values that wait at most: one is enough where the thread is the faster side, and more only cost memory."""

_END = object()


@contextmanager
def ahead(values: Iterator[_Value]) -> Iterator[Iterator[_Value]]:
    """Yield an iterator over the same values, whose code runs in a thread, at most `DEPTH` values ahead.

    An error appears where its value would be. The thread ends with the context, after the value that it is at; values
    that nobody asked for are dropped. Python's filters of warnings belong to the whole process: `values` must leave
    them alone.

    Args:
        values: computes the next value when it is asked for; nothing else may use it from here on.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def taken() -> Iterator[_Value]:
        waiting = deque(thread.submit(next, values, _END) for _ in range(DEPTH))
        while (value := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, values, _END))
            yield value  # type: ignore[misc]  # mypy does not narrow by `is not` an object

    try:
        yield taken()
    finally:
        thread.shutdown(cancel_futures=True)
