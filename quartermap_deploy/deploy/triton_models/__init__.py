"""Models for Triton's Python backend, copied into repositories as they are; nothing here imports them."""
