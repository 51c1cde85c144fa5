"""Storage formats of less than 32 bits: pure functions of tensors, without any optimizer."""
