"""Operators of ONNX Runtime's own, written out in ONNX's."""
