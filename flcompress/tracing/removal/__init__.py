"""Removing blocks from a model: candidates, the proof that one of them is exact, and the same on disk."""
