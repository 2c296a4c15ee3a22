"""Processes that share a training: launchers, collective operations, detection of hangs."""
