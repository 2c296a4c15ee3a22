"""Trace a module to its block graph, skip blocks, and remove them with proof. The submodules import torch."""
