"""Tiny models of every transformer class in diffusers, and the arguments of one forward of each."""

from __future__ import annotations

from tests.zoo import audio, cogvideo, flux, hunyuan, image, lumina, mixed, video, wan
from tests.zoo.entry import Entry

FAMILIES = (wan, hunyuan, cogvideo, video, flux, image, mixed, lumina, audio)
ZOO: dict[str, Entry] = {entry.name: entry for family in FAMILIES for entry in family.ENTRIES}
