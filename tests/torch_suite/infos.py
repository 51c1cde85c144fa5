"""An OptimizerInfo of torch.testing for every rule: inputs that must work, inputs that must raise."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
)

from contract.cases import CASES, RULES, Case
from steepest.optimizer import OPTIMIZERS

__all__ = ["INFOS", "case_of", "info_of"]

SCHEDULERS = (
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10)],
    [lambda opt: StepLR(opt, gamma=0.9, step_size=10), lambda opt: ReduceLROnPlateau(opt)],
)


def case_of(info: OptimizerInfo) -> Case:
    """The rule with its defaults, and what it cannot do."""
    return Case(info.optim_cls.rule.name)


def _inputs(case: Case) -> list[OptimizerInput]:
    decay = {} if "weight_decay" in case.cannot else {"weight_decay": 0.1}
    common: dict[str, dict[str, Any]] = {
        "default": {},
        "non-default lr": {"lr": 0.01},
        "tensor lr": {"lr": torch.tensor(0.001)},
        "nonzero weight_decay": decay,
        "maximize": {**decay, "maximize": True},
        "capturable": {"capturable": True},
        "tensor lr with capturable": {"lr": torch.tensor(0.001), "capturable": True},
        "nonfinite": {"nonfinite": "skip"},
    }
    own = {str(other): other.options for other in CASES if other.name == case.name and other.options}
    return [OptimizerInput(None, kwargs, desc) for desc, kwargs in {**common, **own}.items()]


def _errors(case: Case, device: Any, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """torch's own for all optimizers, the hyperparameters' ranges, and a gradient that may not be stepped."""
    found = list(get_error_inputs_for_all_optims(device, dtype))

    def refuse(words: str, error: type[Exception] = ValueError, **kwargs: Any) -> None:
        given = OptimizerInput(None, kwargs, words)
        found.append(ErrorOptimizerInput(given, error_type=error, error_regex=words))

    refuse("lr must be", lr=-1.0)
    refuse("weight_decay must be", weight_decay=-1.0)
    refuse("nonfinite must be", nonfinite="sometimes")
    if "betas" in case.rule.hyper:
        refuse("betas must be", betas=(1.0, 0.5, 0.5)[: len(case.rule.own_defaults["betas"])])
        refuse("betas must be", betas=torch.tensor([0.9, 0.99]))
    if "eps" in case.rule.hyper:
        refuse("eps must be", eps=-1.0)
    if "unknown keywords" not in case.cannot:
        refuse("unexpected keyword", TypeError, momentun=0.9)
        for flag in ("foreach", "fused", "differentiable"):
            refuse("compile= says how to run", TypeError, **{flag: True})
    bad = Parameter(torch.ones(2, 2, dtype=dtype))
    bad.grad = torch.full_like(bad, torch.nan)
    found.append(
        ErrorOptimizerInput(
            OptimizerInput([bad], {"nonfinite": "raise"}, "a gradient that is not finite"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=FloatingPointError,
            error_regex="infinite or NaN",
        )
    )
    return found


def info_of(case: Case) -> OptimizerInfo:
    """torch's record of an optimizer."""
    return OptimizerInfo(
        OPTIMIZERS[case.name],
        optim_inputs_func=lambda device, dtype=None: _inputs(case),
        optim_error_inputs_func=lambda device, dtype: _errors(case, device, dtype),
        scheduler_inputs=SCHEDULERS,
        supported_impls=(),
        not_og_supported_flags=("maximize", "capturable", "nonfinite", "agree", "master", "state_device"),
        supports_sparse=True,
        has_capturable_arg=True,
        supports_complex="complex" not in case.cannot,
    )


# TernaryFlip moves targets that `ternarize` makes, and is no rule for parameters of its own.
INFOS = [info_of(case) for case in RULES if not case.rule.moves]
