"""From a transformer to an ONNX file: export, rewrites, and the emulation of bf16."""
