"""Run a model or its exports: PyTorch, ONNX Runtime, TensorRT."""

from typing import Literal

Backend = Literal["torch", "onnx", "tensorrt"]
"""What runs the denoiser of an exported pipeline."""
