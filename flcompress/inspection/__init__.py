"""`flcompress inspect`: what a model is made of, from its configuration."""
