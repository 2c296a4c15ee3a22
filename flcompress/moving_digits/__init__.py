"""The embedded benchmark: clips of moving digits, the judge of their quality, and a pipeline to train."""
