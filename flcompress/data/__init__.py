"""Latent datasets: `flcompress encode` writes them, trainings read them."""
