"""The block graph: what a model is made of, without its weights. Nothing here imports torch."""
