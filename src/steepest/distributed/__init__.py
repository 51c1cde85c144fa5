"""Sharded parameters: which elements a process holds, and what the processes must agree on."""
