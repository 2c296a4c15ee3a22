"""What holds for every test."""

from __future__ import annotations

import gc
import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from flcompress.core import registry

# The same examples everywhere, however slow the machine is just then.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

# Code that torch.compile kept for other instructions does not compile for these: a cache for each set of them.
_CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "native")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_{_CAPABILITY}")
)

# Collecting imports modules for good: their objects are not walked over while they come, nor again in every test.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage again, but not what was imported."""
    gc.enable()
    gc.freeze()


pytest_plugins = ["tests.fixtures.exports", "tests.fixtures.recipes"]


@pytest.fixture(autouse=True)
def _registered_alike() -> Iterator[None]:
    """Fail a test that leaves a pass, exporter or back end of its own to those that follow it in the same process."""
    before = dict(registry.PASSES), dict(registry.EXPORTERS), dict(registry.BACKENDS)
    yield
    assert before == (registry.PASSES, registry.EXPORTERS, registry.BACKENDS), "register with monkeypatch.setitem"


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process more than there are cores where tests wait for others, as those marked slow do."""
    return None if config.option.markexpr else (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left with one when the others have ended."""
    longest = ("slow", "e2e")
    rank: dict[Path, int] = {}
    for item in items:
        own = next((order for order, name in enumerate(longest) if item.get_closest_marker(name)), len(longest))
        rank[item.path] = min(rank.get(item.path, own), own)
    items.sort(key=lambda item: rank[item.path])
