"""Images: preparing them for a model, and the real ones that the demo and the tests use."""
