"""torch's OptimizerInfo suite over every rule, and the table of what does not apply, each entry shown."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo

from contract.cases import Case
from loops import for_each

from .checks import CHECKS
from .infos import INFOS, case_of

pytestmark = pytest.mark.filterwarnings("ignore:.*the momentum is used as it is:UserWarning")

# A check, what a rule cannot do (contract/cases.py says why), and the error that says so.
INAPPLICABLE = [
    ("complex_parameters_step_as_pairs", "complex", "is complex"),
    ("sparse_gradients_descend_rosenbrock_as_dense_ones_do", "vectors", "takes matrices"),
]
# What else torch's test_optim.py asks is for options that no rule has: its engine
# chooses how a step runs, and `capturable` is tested in contract/test_capturable.py.
WITHOUT_THE_OPTION = {
    "foreach": "test_foreach_matches_forloop, test_foreach_large_tensor, test_mixed_device_dtype, "
    "test_peak_memory_foreach, test_set_default_dtype_works_with_foreach, test_defaults_changed_to_foreach",
    "fused": "test_fused_matches_forloop, test_fused_large_tensor, test_fused_does_not_step_if_foundinf, "
    "test_fused_cpu_matches_cuda, test_grad_scaling_autocast_fused_optimizers, test_cpu_load_state_dict",
    "differentiable": "TestDifferentiableOptimizer",
}
# Stateless rules keep nothing: the check says so itself.
NO_STATE = ("every_parameter_has_state", "no state: it takes 0 bytes")


def inapplicable(check: str, case: Case) -> str | None:
    """The words of the error with which a check ends for a rule, or None if it applies."""
    return next((words for name, what, words in INAPPLICABLE if name == check and what in case.cannot), None)


@for_each("check", CHECKS)
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.rule.name)
def test_torch_s(info: OptimizerInfo, check: str):
    case = case_of(info)
    for at, given in enumerate(info.optim_inputs_func(device="cpu")):
        if at and (at + list(CHECKS).index(check)) % 3:
            continue  # all checks with the default, a third of them with each other input

        def make(params, given=given, **more):
            return info.optim_cls(params, **{**given.kwargs, **more})

        words = inapplicable(check, case)
        if words is None and check == NO_STATE[0] and not _keeps_state(case, given.kwargs):
            words = NO_STATE[1]
        try:
            if words is None:
                CHECKS[check](make, case)
            else:
                with pytest.raises(ValueError, match=words):
                    CHECKS[check](make, case)
        except BaseException as error:
            error.add_note(f"with {given.desc}: {given.kwargs}") if hasattr(error, "add_note") else None
            raise


def _keeps_state(case: Case, options: dict) -> bool:
    group = {**case.rule.defaults(), **options}
    return bool(case.rule.state_specs(group)) or case.rule.counts_steps or case.rule.transforms


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.rule.name)
def test_torch_s_error_inputs(info: OptimizerInfo):
    for each in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = each.optimizer_error_input
        params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
        make = partial(info.optim_cls, params, **given.kwargs)
        if each.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer = make()
            with pytest.raises(each.error_type, match=each.error_regex):
                optimizer.step()
        elif issubclass(each.error_type, Warning):
            with pytest.warns(each.error_type, match=each.error_regex):
                make()
        else:
            with pytest.raises(each.error_type, match=each.error_regex):
                make()


@for_each("option", WITHOUT_THE_OPTION)
@for_each("info", INFOS)
def test_no_rule_has_the_option_of_a_test_that_is_not_asked(info: OptimizerInfo, option: str):
    assert option not in info.supported_impls
    if info.optim_cls.rule.name == "orthogonalized":
        return  # options of its subclasses are not checked
    with pytest.raises(TypeError, match=option):
        info.optim_cls([Parameter(torch.randn(2, 2))], **{option: True})


def test_the_table_names_checks():
    assert {name for name, *_ in INAPPLICABLE} | {NO_STATE[0]} <= CHECKS.keys()
    assert all(re.compile(words) for *_, words in INAPPLICABLE)
