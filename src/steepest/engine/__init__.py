"""How rules are run: collect the parameters, check the gradients, direct, apply."""
