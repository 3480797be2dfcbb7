"""The function bodies of the ONNX operator, and the operator itself."""
