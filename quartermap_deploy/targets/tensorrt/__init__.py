"""Engines by TensorRT and by TensorRT for RTX: the targets `tensorrt` (`target.py`) and `tensorrt-rtx` (`rtx.py`).

Both build and run by the files beside them, and `flavour.py` says how the two differ. Nothing is imported here, so that
a recipe can read its options (`options.py`) where there is no TensorRT.
"""
