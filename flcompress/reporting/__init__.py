"""`flcompress report`: reads a run directory; writes a page and a summary. Nothing here imports torch."""
