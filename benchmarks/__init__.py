"""What proves the project's own bars: run from a checkout."""
