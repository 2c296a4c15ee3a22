"""Clips of an evaluation: their prompts, who makes them, and the files that every suite reads."""
