"""The lab's models."""
