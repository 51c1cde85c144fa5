"""Published studies done again: each module's `run` trains and returns one result for each experiment."""
