"""Ways out of a bundle to servers that others run: a model repository for Triton, an InferenceService for KServe."""
