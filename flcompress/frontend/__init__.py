"""Reads recipes: YAML, overrides, error messages, the reference and the schema."""
