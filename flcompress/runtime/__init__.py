"""Run a model or its exports: generate a clip, and the back ends that compute it."""
