"""Every hyper-parameter's range is checked, with its name and its value in the message."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import steepest
from steepest.hyperparameters import COMMON_OPTIONS

from .cases import RULES, Case, by_id
from .training import identical, make_params, snapshot

# The base of the orthogonalized family says that it is an identity until it is told what to do.
pytestmark = pytest.mark.filterwarnings("ignore:.*the momentum is used as it is:UserWarning")

every_rule = pytest.mark.parametrize("case", RULES, ids=by_id)

# No hyper-parameter, known or to come, may take these.
NEVER: list[Any] = [math.nan, "no such value", {}, Parameter]

HUGE: list[Any] = [10**400, Fraction(10**400)]
NOT_A_NUMBER: list[Any] = [
    math.inf,
    -math.inf,
    *HUGE,
    Decimal("0.1"),
    True,
    False,
    None,
    "0.1",
    1j,
    [0.1],
    (0.1,),
]
NEGATIVE: list[Any] = [-1, -1e-9]
NOT_A_BOOL: list[Any] = [0, 1, None, "True", 1.0]
NOT_AN_INTEGER: list[Any] = [*HUGE, 1.0, 2.5, True, None, "3"]
NOT_A_BETA: list[Any] = [*HUGE, None, "0.9", 1.0, -0.1, math.nan, math.inf, True]
NOT_A_FRACTION = [*NOT_A_NUMBER, *NEGATIVE, 1.5]

MATRIX = ("muon", "normuon", "polargrad", "scion", "hyperball", "quad", "procrustes")

BOOLS = ("amsgrad", "nesterov", "use_nesterov", "decay_overshoot", "relative_eps", "literal", "maximize")

# By name, or by rule and name where rules differ.
BAD: dict[str | tuple[str, str], list[Any]] = {
    "lr": [*NOT_A_NUMBER, *NEGATIVE, torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor([math.inf])],
    "weight_decay": NOT_A_NUMBER + NEGATIVE,
    "eps": NOT_A_NUMBER + NEGATIVE,
    "momentum": NOT_A_NUMBER + NEGATIVE,
    ("signum", "momentum"): [*NOT_A_FRACTION, 1.0, 1],
    ("sgd_sai", "momentum"): [*NOT_A_FRACTION, 1.0, 1],
    "dampening": NOT_A_FRACTION,
    "threshold": NOT_A_FRACTION,
    "leak": [*NOT_A_FRACTION, 0, 0.0],
    ("simba", "leak"): [value for value in (*NOT_A_FRACTION, 0, 0.0) if value is not None],
    "max_scale": [*NOT_A_NUMBER, *NEGATIVE, 0.0],
    "window_size": [*NOT_AN_INTEGER, 0, -1, 32767],
    "warmup_batches": [*NOT_AN_INTEGER, 0, -1],
    "seed": [*NOT_AN_INTEGER, -1, 2**64],
    ("normuon", "eps"): [*NOT_A_NUMBER, *NEGATIVE, 0, 0.0],
    ("hyperball", "weight_decay"): [*NOT_A_NUMBER, *NEGATIVE, 0.1, 2],
    "momentum_beta": [*NOT_A_FRACTION, 1.0, 1],
    **{(name, "momentum"): [*NOT_A_FRACTION, 1.0, 1] for name in MATRIX},
    "beta2": [*NOT_A_FRACTION, 1.0],
    "ns_steps": [value for value in (*NOT_AN_INTEGER, 0, -1) if value is not None],
    "coefficients": ["quantic", [], [(1.0, 2.0)], 3, None],
    "normalization": ["schatten6", 4],
    "method": ["eigh", None],
    "ns_dtype": [torch.int8, torch.complex64, torch.float8_e4m3fn, "float32"],
    ("muon", "scale"): ["gsnr", None, 1.0],
    "extra_scale": [*NOT_A_NUMBER, *NEGATIVE],
    ("scion", "radius"): [*NOT_A_NUMBER, *NEGATIVE, 0, 0.0],
    "radius": [math.inf, True, "0.1", *NEGATIVE, 0, 0.0],
    "view": ["rows", None],
    "views": [(), [("weight", None)]],
    "bucket_bytes": [*NOT_AN_INTEGER, 0],
    "fp32_matmul_prec": ["low", None],
    "lr_style": ["adamw", 0.2],
    "max_size_dense": [-1, True, None, "all"],
    "max_skew_dense": [-1.0, True, None, "all"],
    "preconditioner_lr": [*NOT_A_NUMBER, *NEGATIVE, 0.0],
    "preconditioner_min_lr": [*NOT_A_NUMBER, *NEGATIVE, 0.0],
    "preconditioner_init_scale": [math.inf, True, "0.1", *NEGATIVE, 0.0],
    "noise_scale": NOT_A_NUMBER + NEGATIVE,
    "dtype": [torch.int8, torch.complex64, "float32"],
    "whiten": ["grad", None],
    "update_probability": [*NOT_A_FRACTION, 0, 0.0],
    "update_flat_steps": [*NOT_AN_INTEGER, -1],
    "update_decay_steps": [*NOT_AN_INTEGER, -1],
    "norm": ["spectral", None],
    "alpha": NOT_A_NUMBER + NEGATIVE,
    "t_alpha_beta3": [value for value in (*NOT_AN_INTEGER, 0, -1) if value is not None],
    "shampoo_beta": [value for value in (*NOT_A_FRACTION, 1.0) if value is not None],
    "precondition_frequency": [*NOT_AN_INTEGER, 0, -1],
    "max_precond_dim": [*NOT_AN_INTEGER, -1],
    "counter_dtype": [torch.int32, torch.uint8, torch.float32, "int8", None],
    "memory": ["count", None, 0],
    "choice": ["lions", None, 0],
    "normalize": ["mean", None, True],
    "scale": ["snr", None, 1],
    "weight_decay_method": ["decouple", "L2", None, 0],
    "rounding": ["up", None, True],
    "state_device": ["cuda", "host", True, torch.device("cpu")],
    "nonfinite": ["error", None, True],
    "agree": ["mesh", True, False],
    "state_dtype": [torch.int16, torch.complex64, "float32", "int4", 32],
    "master": ["split4", 8, True],
    "compile": [0, 1, "True", "auto"],
    **dict.fromkeys(BOOLS, NOT_A_BOOL),
}

GOOD: dict[str | tuple[str, str], list[Any]] = {
    "lr": [0, 0.0, 1, 10.0, 5e-324, torch.tensor(0.0), torch.tensor([0.5])],
    "weight_decay": [0, 0.0, 2, 5.0],
    "eps": [0, 0.0, 1.0],
    ("normuon", "eps"): [5e-324, 1.0],
    ("hyperball", "weight_decay"): [0, 0.0],
    "momentum": [0, 0.0, 0.999],
    "momentum_beta": [0, 0.0, 0.999],
    "beta2": [0, 0.0, 0.999],
    "ns_steps": [None, 1, 30],
    "coefficients": ["polar_express", [(3.4445, -4.775, 2.0315)]],
    "normalization": [None, "frobenius", "schatten4", "schatten8", "aol"],
    "ns_dtype": [None, torch.bfloat16, torch.float16, torch.float32, torch.float64],
    "extra_scale": [1e-9, 7],
    "radius": [None, 1e-9, 7],
    ("scion", "radius"): [1e-9, 7],
    "views": [None, {}],
    "bucket_bytes": [1, 1 << 40],
    "max_size_dense": [0, 3, 2.5, math.inf],
    "max_skew_dense": [0, 3, 2.5, math.inf],
    "preconditioner_init_scale": [None, 1e-9, 7],
    "noise_scale": [0, 0.0, 1.0],
    "dtype": [None, torch.bfloat16, torch.float64],
    "update_probability": [1, 1.0, 1e-9],
    "update_flat_steps": [0, 100],
    "update_decay_steps": [0, 100],
    "alpha": [0, 0.0, 7.5],
    "t_alpha_beta3": [None, 1, 10**6],
    "shampoo_beta": [None, 0, 0.999],
    "precondition_frequency": [1, 1000],
    "max_precond_dim": [0, 1 << 40],
    ("sgd", "momentum"): [0, 1.0, 1.5],
    "dampening": [0, 1, 0.5],
    "threshold": [0, 1, 1.0],
    "leak": [1, 1.0, 1e-9],
    "max_scale": [1e-9, 7],
    "window_size": [1, 126, 32766],
    "warmup_batches": [1, 100],
    "seed": [0, 2**63, 2**64 - 1],
    "state_dtype": [None, torch.bfloat16, torch.float16, torch.float32, torch.float64, "int8"],
    "master": [None],
    "compile": [None, True, False],
    "agree": [None, "all"],
}


def _bad_betas(count: int) -> list[Any]:
    """Of another number, and with one that is none, first, last."""
    others: list[Any] = [0.9, None, "ab"[:count], (), *((0.9,) * n for n in (count - 1, count + 1))]
    one_bad = [
        (0.9,) * at + (beta,) + (0.9,) * (count - at - 1) for beta in NOT_A_BETA for at in range(count)
    ]
    return others + one_bad


def _good_betas(count: int) -> list[Any]:
    return [(0,) * count, (0.0,) + (0.999999,) * (count - 1), [0.9, 0.99, 0.999][:count]]


def _look_up(table: dict[str | tuple[str, str], list[Any]], case: Case, name: str) -> list[Any]:
    if name == "betas":
        count = len(case.rule.defaults()[name])
        return _bad_betas(count) if table is BAD else _good_betas(count)
    return table.get((case.name, name), table.get(name, []))


def _values(
    table: dict[str | tuple[str, str], list[Any]], case: Case, always: Iterable[Any] = ()
) -> Iterator[tuple[str, Any]]:
    """Every option of a rule with every value: a test for each would take longer to start than to run."""
    for name in [*case.rule.hyper, *COMMON_OPTIONS]:
        yield from ((name, value) for value in _look_up(table, case, name))
        # No views at all are a value of theirs.
        yield from ((name, value) for value in always if (name, value) != ("views", {}))


def _make(case: Case, name: str, value: Any) -> steepest.Optimizer:
    return steepest.create(case.name, case.params(), **{name: value})


def _refusal(name: str, value: Any, make: Callable[[], object]) -> str:
    """What it says of the value, which must be refused by name."""
    try:
        make()
    except ValueError as error:
        words = str(error)
        assert name in words, f"{name}={value!r}: {words}"
        assert repr(value) in words, f"{name}={value!r}: {words}"
        return words
    pytest.fail(f"{name}={value!r} is taken")


@every_rule
def test_a_value_out_of_range_is_refused_with_name_and_value(case: Case):
    for name, value in _values(BAD, case, NEVER):
        _refusal(name, value, functools.partial(_make, case, name, value))


@every_rule
def test_a_group_s_value_is_checked_too_and_nothing_is_added(case: Case):
    optimizer = case.make(case.params())
    for name, value in _values(BAD, case, NEVER):
        group = {"params": case.params(), name: value}
        assert "group 1" in _refusal(name, value, functools.partial(optimizer.add_param_group, group))
    assert len(optimizer.param_groups) == 1


@every_rule
def test_the_whole_range_is_accepted(case: Case):
    for name, value in _values(GOOD, case):
        kept = _make(case, name, value).param_groups[0][name]
        assert kept is value or kept == value, f"{name}={value!r}"


@every_rule
def test_a_checkpoint_s_values_are_checked_and_nothing_is_loaded(case: Case):
    params = case.params()
    optimizer = case.make(params)
    before = snapshot(optimizer, params)
    loaded = optimizer.state_dict()
    loaded["param_groups"][0]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match=r"weight_decay .*-1\.0"):
        optimizer.load_state_dict(loaded)
    assert identical(snapshot(optimizer, params), before)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sgd", {"nesterov": True}, ["nesterov", "momentum=0.0"]),
        ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, ["nesterov", "dampening=0.5"]),
        ("signgsd", {"decay_overshoot": True, "weight_decay_method": "l2"}, ["decay_overshoot", "'l2'"]),
        ("simba", {"counter_dtype": torch.int8}, ["window_size", "126", "128"]),
        ("simba", {"leak": 0.1, "window_size": 3}, ["window_size", "leak=0.1"]),
    ],
)
def test_values_that_exclude_each_other_are_refused(name: str, options: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError, match=words[0]) as error:
        Case(name).make(make_params(), **options)
    assert all(word in str(error.value) for word in words), str(error.value)


IS_TEXT = ", which is text: pass a number (YAML takes 1.0e-3 for one, but not 1e-3)"


@pytest.mark.parametrize(
    ("options", "is_text"),
    [
        ({"lr": "1e-3"}, True),
        ({"lr": "-1e-3"}, False),  # no learning rate as a number either
        ({"lr": "fast"}, False),
        ({"eps": "1e-8"}, True),
        ({"betas": ["0.9", 0.99]}, True),
        ({"betas": "0.9"}, False),
        ({"seed": "3"}, True),
        ({"seed": "3.5"}, False),
        ({"rounding": "1e-3"}, False),
        ({"weight_decay": True}, False),
    ],
    ids=str,
)
def test_a_number_that_came_as_text_is_called_text(options: dict[str, Any], is_text: bool):
    """PyYAML reads 1e-3 as a string."""
    for make in (steepest.AdamW, lambda params, **given: steepest.Recipe("adamw", **given)):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be") as refused:
            make(make_params(), **options)
        assert str(refused.value).endswith(IS_TEXT) == is_text
