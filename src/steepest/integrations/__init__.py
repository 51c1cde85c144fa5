"""Adapters for training frameworks, one file each; import the one you use by name.

``import steepest`` imports none of them, and none is needed to use the optimizers in these frameworks.
"""
