"""What `recover_2d` is made of: reading a traced graph by running parts of it, and writing what was read."""
