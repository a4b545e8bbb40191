"""TensorRT: networks, engines, ONNX."""
