"""Run rules: collect parameters, check gradients, measure, update, transform, apply."""
