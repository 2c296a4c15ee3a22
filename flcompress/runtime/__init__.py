"""Run a model or its exports: PyTorch, ONNX Runtime, TensorRT."""

from typing import Literal

Backend = Literal["torch", "onnx", "tensorrt"]
"""What runs the denoiser of an exported pipeline."""

ExportBackend = Literal["onnx", "tensorrt"]
"""Those of them that run an export of the denoiser."""

BenchBackend = Literal["torch", "compile", "onnx", "tensorrt"]
"""What a bench times: torch eager, torch.compile and the exports."""
