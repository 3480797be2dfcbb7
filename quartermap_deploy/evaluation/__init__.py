"""Evaluation: data sets, accuracy on any target, and what is built on them."""

FORMATS = ("imagefolder", "medmnist", "digits")
"""Layouts of labelled images, for `formats.open_dataset`."""

UNLABELLED = "images"
"""The layout of a folder of images without labels."""
