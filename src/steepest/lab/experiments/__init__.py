"""Experiments: which trials to run, where their records are kept, and which run next."""
