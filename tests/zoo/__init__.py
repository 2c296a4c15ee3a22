"""Tiny models of every transformer class in diffusers, and the arguments of one forward of each."""

from __future__ import annotations

from tests.zoo import audio, flux, hunyuan, image, lumina, video, wan
from tests.zoo.entry import Entry

ZOO: dict[str, Entry] = {
    entry.name: entry for family in (wan, hunyuan, video, flux, image, lumina, audio) for entry in family.ENTRIES
}
