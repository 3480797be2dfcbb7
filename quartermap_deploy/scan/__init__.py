"""The selective scan in PyTorch: its definition in float64, vectorised, and as torch operators."""
