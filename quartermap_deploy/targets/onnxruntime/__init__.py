"""The target `onnxruntime`: the portable model, by whichever execution providers of ONNX Runtime are wanted."""
