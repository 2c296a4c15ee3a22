"""Exporters, one file each, and what they share: parity, shapes, files, sessions and the runtime."""
