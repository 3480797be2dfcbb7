"""Validation: parity with PyTorch, tolerances, golden files. Nothing here knows the compiler or a bundle."""
