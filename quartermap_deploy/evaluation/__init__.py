"""Evaluation: data sets, accuracy on any target, and what is built on them."""
