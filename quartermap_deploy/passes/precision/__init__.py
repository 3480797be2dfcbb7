"""What `cast_precision` is made of: the choice of what stays float32, and the writing of the types."""
