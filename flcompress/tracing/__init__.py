"""From a module to its block graph, and from a smaller graph back to a module. The submodules import torch."""
