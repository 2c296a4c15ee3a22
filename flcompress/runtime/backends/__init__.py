"""The back ends, one class each; `flcompress.core.registry` knows them by name."""
