"""State dicts of codes and corrections: they resume bit for bit, and load where state is stored otherwise."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import steepest
from contract.cases import CASES, RULES, Case
from contract.training import identical, snapshot, steps
from loops import for_each
from steepest.engine import storage
from steepest.engine.layout import real_view
from steepest.engine.state import blank_state
from steepest.formats.load import reblock

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

KINDS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (F32, {"state_dtype": "int8"}),
    "split8": (BF16, {"master": "split8", "rounding": "stochastic"}),
    "split16": (F16, {"master": "split16"}),
    "both": (BF16, {"state_dtype": "int8", "master": "split8", "rounding": "stochastic"}),
}


def made(case: Case, dtype: torch.dtype, **options: Any) -> tuple[steepest.Optimizer, list[Parameter]]:
    """An optimizer of a matrix with blocks of 64, one with blocks of 32, and a tensor that is not coded."""
    shapes = [(64, 64), (128, 32), (7,)]
    if case.options.get("view") == "batch":
        shapes = [(4, 16, 64), (4, 32, 32), (2, 2, 3)]
    params = case.params(dtype, shapes=shapes)
    return case.make(params, weight_decay=0.125, **options), params


def trained(case: Case, kind: str, count: int = 2) -> tuple[steepest.Optimizer, list[Parameter]]:
    dtype, options = KINDS[kind]
    optimizer, params = made(case, dtype, **options)
    steps(optimizer, params, range(count))
    return optimizer, params


def through_a_file(tree: Any) -> Any:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def put(params: list[Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)


def averages(case: Case) -> set[str]:
    specs = case.rule.state_specs({**case.rule.defaults(), **case.options})
    return {name for name, spec in specs.items() if spec.range is not None}


# Resume


# Every rule with every kind, and each of the other cases with one.
RESUMED = [(case, kind) for case in RULES for kind in KINDS] + list(
    zip(CASES[len(RULES) :], itertools.cycle(KINDS), strict=False)
)


def resumed(case: Case, kind: str, on_disk: Callable[[dict[str, Any]], Any] = through_a_file) -> bool:
    optimizer, params = trained(case, kind)
    saved = on_disk(optimizer.state_dict())
    dtype, options = KINDS[kind]
    again, twins = made(case, dtype, **options)
    put(twins, params)
    again.load_state_dict(saved)
    steps(optimizer, params, range(2, 4))
    steps(again, twins, range(2, 4))
    return identical(snapshot(again, twins), snapshot(optimizer, params))


@for_each(("case", "kind"), RESUMED)
def test_a_resumed_run_is_the_run_that_never_stopped(case: Case, kind: str):
    assert resumed(case, kind)


def test_the_check_of_resuming_sees_what_is_lost():
    """Controls: scales in half precision, and masters made again from the parameters."""

    def rounded(saved: dict[str, Any]) -> dict[str, Any]:
        for state in saved["state"].values():
            for name in [name for name in state if name.endswith("_scale")]:
                state[name] = state[name].to(F16).to(F32)
        return saved

    def forgotten(saved: dict[str, Any]) -> dict[str, Any]:
        for state in saved["state"].values():
            state.pop("correction")
        return saved

    assert resumed(Case("adamw"), "int8", copy.deepcopy)
    assert not resumed(Case("adamw"), "int8", lambda saved: rounded(copy.deepcopy(saved)))
    assert not resumed(Case("lion"), "split16", lambda saved: forgotten(copy.deepcopy(saved)))


@for_each("case", RULES)
def test_what_is_saved(case: Case):
    optimizer, params = trained(case, "both")
    saved = optimizer.state_dict()
    for number, param in enumerate(params):
        state, block = saved["state"][number], [64, 32, None][number]
        assert state["correction"].dtype == torch.int8
        assert state["correction"].shape == param.shape
        for name in averages(case):
            codes = state[name]
            assert codes.shape == param.shape
            if block is None:
                assert codes.dtype == F32
                assert name + "_scale" not in state
            else:
                assert codes.dtype == (torch.uint8 if name.endswith("_sq") else torch.int8)
                scale = state[name + "_scale"]
                assert scale.dtype == F32
                assert scale.shape == (param.shape[0], param.shape[1:].numel() // block)
    assert saved["param_groups"][0]["state_format"] == 1


def test_the_bytes_are_those_that_are_planned():
    """What explain() and plans count, before there is any state."""
    for case in CASES:
        for kind in KINDS:
            optimizer, params = trained(case, kind, count=1)
            group = optimizer.param_groups[0]
            blank = [blank_state(real_view(param), group, None) for param in params]
            planned = sum(entry.nbytes for state in blank for _, entry in state.values())
            assert planned == optimizer.state_bytes(), (case, kind)


# The version of the formats


def refused(case: Case, kind: str, saved: dict[str, Any], words: str) -> None:
    """By an optimizer with codes, and by one without; nothing is loaded."""
    for options in (KINDS[kind][1], {}):
        optimizer, params = made(case, KINDS[kind][0], **options)
        steps(optimizer, params, range(1))
        before, kept = snapshot(optimizer, params), copy.deepcopy(saved)
        with pytest.raises(ValueError, match=words + ".*; nothing was loaded"):
            optimizer.load_state_dict(saved)
        assert identical(snapshot(optimizer, params), before)
        assert identical(saved, kept)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_version_of_later(version: Any):
    saved = copy.deepcopy(trained(Case("adamw"), "both")[0].state_dict())
    saved["param_groups"][0]["state_format"] = version
    refused(Case("adamw"), "both", saved, "group 0 of the state dict has state_format")
    saved["param_groups"][0] = {"params": [0, 1, 2], "state_format": version}
    refused(Case("adamw"), "both", saved, "group 0 of the state dict has state_format")


def test_groups_that_lack_all_options_still_load():
    optimizer, _ = trained(Case("adamw"), "both")
    saved = copy.deepcopy(optimizer.state_dict())
    for group in ({"params": [0, 1, 2], "state_format": 1}, {"params": [0, 1, 2]}):
        saved["param_groups"] = [group]
        again = made(Case("adamw"), BF16, **KINDS["both"][1])[0]
        again.load_state_dict(saved)
        assert identical(again.state_dict(), optimizer.state_dict())


# From floats to codes


def numbers(codes: Tensor, scale: Tensor) -> Tensor:
    """The definition, in float64."""
    code = codes.double().reshape(*scale.shape, -1)
    unit = code * code.abs() / 127**2 if codes.dtype == torch.int8 else (code / 255) ** 4
    return (unit * scale.double()[..., None]).reshape(codes.shape)


def check_encoded(codes: Tensor, scale: Tensor, floats: Tensor) -> None:
    """The codes are the nearest there are, but for 0 of what is above 0; blocks of zeros have the scale 0."""
    rows = floats.double().reshape(*scale.shape, -1)
    assert torch.equal(rows.abs().amax(-1), scale.double())
    unit = scale.double().clamp(min=1e-300)[..., None]
    if codes.dtype == torch.int8:
        ideal = 127 * (rows / unit).sign() * (rows / unit).abs().sqrt()
        assert (codes - ideal.reshape(codes.shape)).abs().max() <= 0.5 + 1e-4
    else:
        assert codes.dtype == torch.uint8
        table = (torch.arange(1.0, 256.0, dtype=torch.float64) / 255) ** 4
        best = ((rows / unit)[..., None] - table).abs().amin(-1)
        error = (numbers(codes, scale).reshape(rows.shape) - rows).abs() / unit
        assert (error[rows > 0] <= best[rows > 0] + 1e-6).all()
        assert torch.equal(codes == 0, floats == 0)


def float_source(name: str, params: list[Parameter]) -> torch.optim.Optimizer:
    if name == "torch.optim.AdamW":
        return torch.optim.AdamW(params, lr=0.01)
    if name == "amsgrad":
        return torch.optim.AdamW(params, lr=0.01, amsgrad=True)
    if name == "torch.optim.SGD":
        return torch.optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.0)
    return Case(name.split()[0]).make(params, state_dtype=BF16 if "bfloat16" in name else None)


FLOATS = {
    "torch.optim.AdamW": ("adamw", {}),
    "amsgrad": ("adamw", {"amsgrad": True}),
    "adamw": ("adamw", {}),
    "ademamix": ("ademamix", {}),
    "lion bfloat16": ("lion", {}),
    "muon": ("muon", {}),
    "soap": ("soap", {}),
}


@pytest.mark.parametrize("name", FLOATS)
def test_floats_become_codes(name: str):
    rule, options = FLOATS[name]
    case = Case(rule, options)
    params = case.params(shapes=[(64, 64), (128, 32), (7,)])
    source = float_source(name, params)
    steps(source, params, range(3))
    saved = copy.deepcopy(source.state_dict())
    saved["state"][0][min(averages(case))][3, :64] = 0.0  # a block of zeros
    here, twins = made(case, F32, state_dtype="int8")
    put(twins, params)
    here.load_state_dict(through_a_file(saved))
    assert here.param_groups[0]["state_dtype"] == "int8"
    for number, param in enumerate(twins):
        for entry in averages(case):
            floats, state = saved["state"][number][entry], here.state[param]
            if number == 2:
                assert identical(state[entry], floats.float())
                continue
            codes, scale = state[entry], state[entry + "_scale"]
            assert codes.is_contiguous()
            check_encoded(codes, scale, floats)
    assert identical(here.state_dict(), loaded_again(case, here)), "as codes they stay as they are"
    steps(here, twins, range(3, 5))
    steps(source, params, range(3, 5))
    for twin, param in zip(twins, params, strict=True):
        moved = (param - twin).abs().max()
        assert moved <= 0.1, "one step of a sign is 0.03"


def loaded_again(case: Case, optimizer: steepest.Optimizer) -> dict[str, Any]:
    again = made(case, F32, state_dtype="int8")[0]
    again.load_state_dict(optimizer.state_dict())
    return again.state_dict()


def test_a_second_moment_is_never_encoded_as_zero():
    """A code of 0 beside a momentum that is not: the step would be m/ε."""
    param = Parameter(torch.ones(64, 64))
    source = torch.optim.AdamW([param])
    steps(source, [param], range(1))
    squares = source.state[param]["exp_avg_sq"]
    squares.copy_(torch.logspace(-30, 0, 4096)[torch.randperm(4096)].view(64, 64))
    here = steepest.AdamW([param], state_dtype="int8")
    here.load_state_dict(source.state_dict())
    codes, scale = here.state[param]["exp_avg_sq"], here.state[param]["exp_avg_sq_scale"]
    check_encoded(codes, scale, squares)
    assert codes.min() == 1
    linear = (255 * (squares / squares.amax(1, keepdim=True)) ** 0.25).round().to(torch.uint8)
    with pytest.raises(AssertionError):
        check_encoded(linear.where(squares > 1e-9, torch.zeros_like(linear)), scale, squares)


# From codes to floats


@for_each(
    ("dtype", "option", "stored"),
    [
        (F32, None, F32),
        (BF16, None, BF16),
        (BF16, F32, F32),
        (F32, BF16, BF16),
        (F32, torch.float64, torch.float64),
    ],
)
@for_each("name", ["adamw", "ademamix", "signum", "normuon", "procrustes"])
def test_codes_become_floats_of_this_run_s_dtype(name: str, dtype: torch.dtype, option: Any, stored: Any):
    case = Case(name)
    optimizer, params = made(case, dtype, state_dtype="int8")
    steps(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    here, twins = made(case, dtype, state_dtype=option)
    here.load_state_dict(through_a_file(saved))
    assert here.param_groups[0]["state_dtype"] == option
    blank = blank_state(real_view(twins[0]), here.param_groups[0], None)
    expected = {name: entry for name, (_, entry) in blank.items()}
    for number, param in enumerate(twins):
        for entry in averages(case):
            was, now = saved["state"][number], here.state[param]
            assert entry + "_scale" not in now
            if number == 2:
                assert identical(now[entry], was[entry]), "floats keep the checkpoint's dtype"
                continue
            wide = numbers(was[entry], was[entry + "_scale"])
            near = {"rtol": 2.0**-7 if stored == BF16 else 1e-6, "atol": 0}
            assert now[entry].dtype == expected[entry].dtype
            assert name == "procrustes" or now[entry].dtype == stored
            torch.testing.assert_close(now[entry].double(), wide.to(stored).double(), **near)
    steps(here, twins, range(3, 5))
    assert all(twin.isfinite().all() for twin in twins)


def test_only_the_groups_that_are_coded_here():
    """One group's tensors are not coded here, the other's are."""

    def both(first: Any, second: Any) -> tuple[steepest.Optimizer, list[Parameter]]:
        params = [Parameter(torch.ones(64, 64)), Parameter(torch.ones(64, 64))]
        groups = [{"params": [p], "state_dtype": s} for p, s in zip(params, (first, second), strict=True)]
        return steepest.Lion(groups, lr=0.01), params

    source, params = both("int8", None)
    steps(source, params, range(2))
    here, twins = both(None, "int8")
    here.load_state_dict(source.state_dict())
    assert [here.state[param]["exp_avg"].dtype for param in twins] == [F32, torch.int8]
    assert [group["state_dtype"] for group in here.param_groups] == [None, "int8"]


def test_a_transposed_parameter_gets_floats_that_lie_as_it_does():
    def optimizer(**options: Any) -> tuple[steepest.Optimizer, list[Parameter]]:
        param = Parameter(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).t())
        return steepest.Lion([param], lr=0.01, **options), [param]

    (source, params), (here, twins) = optimizer(state_dtype="int8"), optimizer()
    steps(source, params, range(2))
    here.load_state_dict(source.state_dict())
    state, entry = source.state[params[0]], here.state[twins[0]]["exp_avg"]
    assert entry.stride() == twins[0].stride()
    torch.testing.assert_close(
        entry.double(), numbers(state["exp_avg"], state["exp_avg_scale"]), rtol=1e-6, atol=0
    )
    here, twins = optimizer(state_dtype="int8")
    here.load_state_dict({**source.state_dict(), "state": {0: {"exp_avg": entry.contiguous()}}})
    check_encoded(here.state[twins[0]]["exp_avg"], here.state[twins[0]]["exp_avg_scale"], entry)


# Other blocks


@pytest.mark.parametrize(("theirs", "ours"), [(32, 64), (64, 32)])
def test_other_blocks(theirs: int, ours: int, monkeypatch: pytest.MonkeyPatch):
    """As if another version had chosen them otherwise."""
    params = [Parameter(torch.ones(64, 128))]
    monkeypatch.setattr(storage, "block_size", lambda shape: theirs)
    source = steepest.AdamW(params, state_dtype="int8")
    steps(source, params, range(3))
    saved = copy.deepcopy(source.state_dict())
    monkeypatch.setattr(storage, "block_size", lambda shape: ours)
    here = steepest.AdamW(params, state_dtype="int8")
    here.load_state_dict(saved)
    state = here.state[params[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scale = saved["state"][0][name], saved["state"][0][name + "_scale"]
        assert scale.shape == (64, 128 // theirs)
        assert state[name + "_scale"].shape == (64, 128 // ours)
        assert identical([state[name], state[name + "_scale"]], list(reblock(codes, scale, ours)))
        decoded = numbers(codes, scale).float()
        if ours > theirs:
            check_encoded(state[name], state[name + "_scale"], decoded)
        error = (numbers(state[name], state[name + "_scale"]) - decoded).abs()
        assert error.max() <= decoded.abs().max() / 64
    steps(here, params, range(3, 4))
    assert params[0].isfinite().all()


# Corrections


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("name", ["lion", "muon", "signgsd"])
def test_corrections_are_dropped_with_one_warning(name: str, dtype: torch.dtype):
    case = Case(name)
    source = trained(case, "split8")[0]
    here, params = made(case, dtype)
    with pytest.warns(UserWarning, match="3 parameters with no master") as caught:
        here.load_state_dict(source.state_dict())
    assert len(caught) == 1
    assert "master_state_dict" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert not any("correction" in here.state[param] for param in params)
    assert here.param_groups[0]["master"] is None
    steps(here, params, range(2))
    assert not any("correction" in here.state[param] for param in params)


def test_wider_parameters_beside_narrow_ones():
    source = trained(Case("lion"), "split8")[0]
    params = [
        Parameter(torch.ones(shape, dtype=dtype))
        for shape, dtype in (((64, 64), F32), ((128, 32), BF16), ((7,), F32))
    ]
    here = steepest.Lion(params, master="split16")
    with pytest.warns(UserWarning, match="2 parameters with no master or a wider dtype"):
        here.load_state_dict(source.state_dict())
    assert ["correction" in here.state[param] for param in params] == [False, True, False]
    steps(here, params, range(2))
    assert ["correction" in here.state[param] for param in params] == [False, True, False]


@pytest.mark.parametrize("name", ["adamw", "sgd_sai", "muon"])
def test_checkpoints_of_before(name: str):
    """Their groups know neither of codes nor of masters."""
    case = Case(name)
    source, params = made(case, BF16, state_dtype=F32)
    steps(source, params, range(2))
    saved = copy.deepcopy(source.state_dict())
    for group in saved["param_groups"]:
        del group["master"]
    here, twins = made(case, BF16, **KINDS["both"][1])
    put(twins, params)
    here.load_state_dict(through_a_file(saved))
    assert {name: here.param_groups[0][name] for name in ("master", "state_dtype")} == {
        "master": "split8",
        "state_dtype": "int8",
    }
    for number, param in enumerate(twins):
        state = here.state[param]
        assert not state["correction"].any()
        for entry in averages(case):
            if number < 2:
                check_encoded(state[entry], state[entry + "_scale"], saved["state"][number][entry])
    steps(here, twins, range(2, 4))
    floats, twins = made(case, BF16, state_dtype=F32)
    put(twins, params)
    floats.load_state_dict(saved)
    steps(floats, twins, range(2, 4))
    steps(source, params, range(2, 4))
    assert identical(snapshot(floats, twins), snapshot(source, params))


def test_nothing_else_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ours in KINDS:
            for theirs in KINDS:
                if KINDS[ours][1].get("master") or not KINDS[theirs][1].get("master"):
                    made(Case("adamw"), KINDS[ours][0], **KINDS[ours][1])[0].load_state_dict(
                        trained(Case("adamw"), theirs, 1)[0].state_dict()
                    )


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(None, "split8"), (None, "split16"), ("split16", "split8"), ("split8", "split16"), ("split8", "split8")],
)
def test_corrections_of_another_width(theirs: Any, ours: Any, dtype: torch.dtype):
    source, params = made(Case("lion"), dtype, master=theirs)
    steps(source, params, range(3))
    masters = [source.master_weight(param) for param in params]
    here, twins = made(Case("lion"), dtype, master=ours)
    put(twins, params)
    here.load_state_dict(through_a_file(source.state_dict()))
    assert here.param_groups[0]["master"] == ours
    for param, twin, master in zip(params, twins, masters, strict=True):
        correction = here.state[twin]["correction"]
        assert correction.dtype == (torch.int8 if ours == "split8" else torch.int16)
        if theirs is None:
            assert not correction.any()
        read = here.master_weight(twin)
        if theirs == "split16":
            places = 16 if dtype == BF16 else 19
            # Where rounding would reach the parameter's next value it is cut off.
            error = (read - master).abs() / master.abs().clamp(min=2.0**-14)
            assert 0 < error.max() <= 2.0 ** (1 - places)
            assert error.median() <= 2.0**-places
        else:
            assert torch.equal(read, master)
        assert torch.equal(twin, param)
    steps(here, twins, range(3, 5))


def test_a_run_that_goes_on_with_a_wider_correction_is_as_good_as_one_from_those_masters():
    source, params = made(Case("lion"), BF16, master="split8")
    steps(source, params, range(3))
    here, twins = made(Case("lion"), BF16, master="split16")
    put(twins, params)
    here.load_state_dict(source.state_dict())
    other, others = made(Case("lion"), BF16, master="split16")
    other.load_state_dict(
        {
            **source.state_dict(),
            "state": {n: {"exp_avg": s["exp_avg"]} for n, s in source.state_dict()["state"].items()},
        }
    )
    for param, twin in zip(params, others, strict=True):
        other.set_master_weight(twin, source.master_weight(param))
    steps(here, twins, range(3, 5))
    steps(other, others, range(3, 5))
    assert identical([here.master_weight(p) for p in twins], [other.master_weight(p) for p in others])


# What cannot be loaded


def _without_scales(state: dict[str, Any]) -> None:
    del state["exp_avg_scale"]


def _without_codes(state: dict[str, Any]) -> None:
    del state["exp_avg"]


def _put(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def do(state: dict[str, Any]) -> None:
        state[name] = change(state[name])

    return do


WHO = r"of parameter 1 of group 0 \(shape \(128, 32\)\)"
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "codes without scales": (_without_scales, f"'exp_avg' {WHO} has codes of torch.int8 but not the scales"),
    "scales without codes": (_without_codes, f"the state {WHO} has 'exp_avg_scale' but no 'exp_avg'"),
    "a row of scales less": (
        _put("exp_avg_scale", lambda s: s[1:]),
        rf"'exp_avg_scale' {WHO}: scales \[127, 1\]",
    ),
    "flat scales": (_put("exp_avg_sq_scale", Tensor.flatten), rf"'exp_avg_sq_scale' {WHO}: scales \[128\]"),
    "scales of blocks of 16": (
        _put("exp_avg_scale", lambda s: s.repeat(1, 2)),
        rf"'exp_avg_scale' {WHO}: scales \[128, 2\]",
    ),
    "scales across rows": (
        _put("exp_avg_scale", lambda s: s[::2]),
        rf"'exp_avg_scale' {WHO}: scales \[64, 1\]",
    ),
    "half scales": (_put("exp_avg_scale", Tensor.half), f"'exp_avg_scale' {WHO}: .*torch.float16"),
    "a number as scale": (_put("exp_avg_scale", lambda s: 1.0), f"'exp_avg_scale' {WHO}: .*float"),
    "codes that torch has cast": (
        _put("exp_avg", Tensor.float),
        f"'exp_avg' {WHO} has scales and dtype torch.float32",
    ),
    "signed codes of a square": (
        _put("exp_avg_sq", lambda c: c.to(torch.int8)),
        f"'exp_avg_sq' {WHO} has scales and dtype torch.int8 .* are torch.uint8",
    ),
    "unsigned codes": (_put("exp_avg", lambda c: c.to(torch.uint8)), f"'exp_avg' {WHO} .* are torch.int8"),
    "wide codes": (_put("exp_avg", lambda c: c.to(torch.int16)), f"'exp_avg' {WHO} .* torch.int16"),
    "codes of another shape": (_put("exp_avg", Tensor.t), rf"'exp_avg' {WHO} has shape \(32, 128\)"),
    "wide codes without scales": (
        lambda state: (_put("exp_avg", lambda c: c.to(torch.int16))(state), _without_scales(state)),
        f"'exp_avg' {WHO} has dtype torch.int16",
    ),
    "scales of the step count": (
        lambda state: state.update(step_scale=torch.ones(1, 1)),
        f"state 'step' {WHO} has scales and dtype torch.float64",
    ),
    "a correction of another shape": (
        _put("correction", Tensor.t),
        rf"'correction' {WHO} has shape \(32, 128\), the parameter \(128, 32\)",
    ),
    "a correction in floats": (
        _put("correction", Tensor.float),
        f"'correction' {WHO} has dtype torch.float32",
    ),
    "a number as correction": (_put("correction", lambda c: 0), f"'correction' {WHO} is a int"),
}


@for_each("what", BROKEN)
def test_state_that_cannot_be_decoded(what: str):
    saved = copy.deepcopy(trained(Case("adamw"), "both")[0].state_dict())
    change, words = BROKEN[what]
    change(saved["state"][1])
    refused(Case("adamw"), "both", saved, words)


def test_integers_of_a_rule_are_never_codes():
    optimizer, _ = trained(Case("simba"), "int8")
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["counts_scale"] = torch.ones(128, 1)
    refused(Case("simba"), "int8", saved, "'counts_scale'")


def test_torch_s_own_loading_would_cast_the_codes():
    """The trap itself, which ours avoids."""
    optimizer, _ = trained(Case("lion"), "int8")
    trap = made(Case("lion"), F32)[0]
    torch.optim.Optimizer.load_state_dict(trap, optimizer.state_dict())
    assert {state["exp_avg"].dtype for state in trap.state.values()} == {F32}
    again = made(Case("lion"), F32, state_dtype="int8")[0]
    again.load_state_dict(optimizer.state_dict())
    assert [state["exp_avg"].dtype for state in again.state.values()] == [torch.int8, torch.int8, F32]


@pytest.mark.parametrize(("theirs", "ours"), [("int8", None), (None, "int8"), ("int8", "int8")])
def test_entries_that_the_present_options_do_not_ask_for(theirs: Any, ours: Any):
    """The maximum of a run with AMSGrad, whose groups do not say so."""
    optimizer, params = made(Case("adamw", {"amsgrad": True}), F32, state_dtype=theirs)
    steps(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["max_exp_avg_sq"].dtype == (torch.uint8 if theirs else F32)
    saved["param_groups"] = [{"params": [0, 1, 2]}]
    here, twins = made(Case("adamw"), F32, state_dtype=ours)
    here.load_state_dict(saved)
    assert not any(name.startswith("max") for name in here.state[twins[0]])
    here.param_groups[0]["amsgrad"] = True
    steps(here, twins, range(3))
    assert here.state[twins[0]]["max_exp_avg_sq"].dtype == (torch.uint8 if ours else F32)
    assert all(twin.isfinite().all() for twin in twins)


# Copies


COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@for_each("copier", COPIERS)
@for_each("kind", KINDS)
@for_each("name", ["adamw", "muon", "sgd_sai", "signgsd"])
def test_a_copy_steps_on_as_the_original_does(name: str, kind: str, copier: str):
    optimizer, params = trained(Case(name), kind)
    other = COPIERS[copier](optimizer)
    twins = other.param_groups[0]["params"]
    assert identical(snapshot(other, twins), snapshot(optimizer, params))
    steps(optimizer, params, range(2, 4))
    steps(other, twins, range(2, 4))
    assert identical(snapshot(other, twins), snapshot(optimizer, params))
    assert not {id(param) for param in params} & {id(twin) for twin in twins}
