"""Choices and defaults of the experiments.

They stand apart from the experiments so that the command line can show and complete them without torch.
"""

from typing import Literal

TASKS = ("text", "digits", "images", "sasrec")
"""The built-in tasks."""

DTYPES = ("float32", "float64", "bfloat16", "float16")
"""The dtypes of parameters, by torch's names."""

LEAST_ROUNDS = 9
"""Rounds of a timing."""

RACE_OPTIMIZERS = ("adamw", "muon", "lion", "signgsd", "sgd_sai", "quad", "simba", "procrustes", "signum")
RACE_BUDGET = "8m"

BENCH_BASELINE = "torch.optim:AdamW"
BENCH_OPTIMIZERS = ("adamw", "lion", "signgsd", "sgd_sai", "simba", "muon")

PROFILE_POINTS = 100
GROWTH_ROUNDS = 5
GROWTH_SIZES = {"125m": "gpt2-124m", "350m": "gpt2-350m", "774m": "gpt2-774m", "1.5b": "gpt2-1.5b"}
"""The sizes of GPT-2, and their names among the models of `bench`."""

HORIZON_STEPS = (500, 2000, 8000)
HORIZON_OPTIMIZERS = ("adamw", "muon", "lion", "sgd_sai", "simba")

GRID_OPTIMIZERS = ("sgd", "sgd_sai", "adamw", "adam_mini", "lion")

SASREC_VARIANTS = ("simba_sign_m", "simba_lions_choice", "simba_always_m")
"""Labels of Simba with other settings."""
SASREC_OPTIMIZERS = ("adamw", "lion", "signgsd", "simba", *SASREC_VARIANTS, "simba_leaky", "sgd_sai", "muon")
"""The labels of the study's optimizers."""
InteractionFormat = Literal["recbole", "movielens", "amazon-2014", "amazon-2018", "plain"]

TERNARY_TASKS = ("mlp", "convnet", "text")
