"""Progress: one callback interface, shown as lines, as a live table, or in TensorBoard."""

from .callback import Callback, Several

__all__ = ["Callback", "Several"]
