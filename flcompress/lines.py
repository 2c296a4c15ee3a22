"""Lines of text files: they end at a newline and nowhere else."""

from __future__ import annotations


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends: a newline, or a carriage return and a newline.

    `str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which people and JSON have in sentences.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]
