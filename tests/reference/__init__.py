"""Reference optimizers in plain float64, one element at a time, written only from their equations."""
