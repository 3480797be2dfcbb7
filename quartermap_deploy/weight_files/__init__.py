"""The formats of files of weights. What a file says of its tensors is read and checked before a number of it is."""
