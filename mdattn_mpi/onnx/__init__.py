"""ONNX models: reading them, finding attention and tokens, sharding; knows no TensorRT."""
