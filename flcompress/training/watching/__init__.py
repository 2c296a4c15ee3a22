"""Monitoring of a training: held-out figures, limits, sample strips and trackers."""
