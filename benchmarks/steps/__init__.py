"""Steps, beside other packages' optimizers and the hardware's limits: `python -m benchmarks.steps`."""
