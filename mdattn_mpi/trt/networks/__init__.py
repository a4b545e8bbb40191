"""TensorRT networks, one module a strategy."""
