"""The built-in passes, one module each: arguments, facts and costs; `flcompress.training` does the work."""
