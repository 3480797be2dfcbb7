"""torch → ONNX: the torch operators, their definition, and the exporter."""
