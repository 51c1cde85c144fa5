"""Sharded parameters: local shards, their places in the whole tensor, and agreement of processes."""
