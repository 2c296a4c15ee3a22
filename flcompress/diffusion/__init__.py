"""Noising processes, schedulers, guidance and sampling: the mathematics, written once."""
