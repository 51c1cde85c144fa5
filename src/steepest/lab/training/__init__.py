"""Training one model with one optimizer, and what it costs."""
