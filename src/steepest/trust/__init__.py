"""Proof that a run does what it says: that it resumes to the bit, and steps by its rule."""

from steepest.trust.checkpoint import load_checkpoint, save_checkpoint
from steepest.trust.flat import flatten_state_dict, unflatten_state_dict

__all__ = ["flatten_state_dict", "load_checkpoint", "save_checkpoint", "unflatten_state_dict"]
