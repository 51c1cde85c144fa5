"""Proof that a run does what it says: that it resumes to the bit, and steps by its rule."""
