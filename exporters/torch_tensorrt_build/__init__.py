"""From a transformer to engines of Torch-TensorRT: export, lowering, parts, build."""
