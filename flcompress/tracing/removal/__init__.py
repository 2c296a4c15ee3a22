"""Remove blocks from a model: candidates, the proof that one of them is exact, and removal on disk."""
