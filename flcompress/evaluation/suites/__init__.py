"""Evaluation suites that judge clip files."""
