"""torch → ONNX: the exporter, and the names that it gives to nodes."""
