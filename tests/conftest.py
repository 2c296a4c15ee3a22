"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples everywhere, however slow the machine is just then.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

pytest_plugins = ["tests.fixtures.exports", "tests.fixtures.recipes"]
