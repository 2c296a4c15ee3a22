"""From an ONNX file to a TensorRT engine: profiles and the build."""
