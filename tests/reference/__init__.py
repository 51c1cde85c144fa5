"""The optimizers once more, in plain float64 numbers, one element at a time, from their equations alone."""
