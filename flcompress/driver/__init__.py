"""`flcompress apply`: checks, runs passes in order, stores their results."""
